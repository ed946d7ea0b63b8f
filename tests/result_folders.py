"""Make result folders as sweeps leave them, any number, without training."""

import random

import torch

from bnnft import BERCurve
from bnnft.runs.job import begin_job, fail_job
from bnnft.runs.results import write_result


def metrics(rate, margin):
    return {
        "test/acc": 0.9 - rate,
        "test/tolerable_ber": rate + 0.01,
        "test/margin/fc1": margin,
        "test/importance_cv/fc1": 0.5 / margin,
        "test/margin/fc2": 3 * margin,
    }


def config(rate, seed, loss="cross_entropy"):
    return {"ber": {"rate": rate}, "seed": seed, "loss": {"_target_": loss}, "name": "made"}


def begin(folder, rate, seed, loss=None):
    """A job that has begun; returns its folder and config."""
    overrides = [f"ber.rate={rate}", f"seed={seed}", "dataset=digits"] + ([f"loss={loss}"] if loss else [])
    job = folder / ",".join(overrides)
    (job / ".hydra").mkdir(parents=True)
    (job / ".hydra" / "overrides.yaml").write_text("".join(f"- {override}\n" for override in overrides))
    begin_job(job, config(rate, seed, loss or "cross_entropy"))
    return job, config(rate, seed, loss or "cross_entropy")


def finish(folder, rate, seed, loss=None, rates=10, maps=5, axis="rate"):
    """A finished job; with ``axis="voltage"`` the points of its curve are 1 V minus the rates."""
    job, settings = begin(folder, rate, seed, loss)
    draw = random.Random(f"{rate}{seed}{loss}")
    points = [round(0.03 * number, 4) for number in range(rates)]
    accuracy = [
        [max(0.1, 0.9 - rate - abs(point - rate) - 0.02 * draw.random()) for _ in range(maps)] for point in points
    ]
    measured = metrics(rate, 2 + 10 * rate + draw.random())
    if axis == "voltage":
        points = [round(1 - point, 4) for point in points]
        measured["test/tolerable_voltage"] = 1 - measured.pop("test/tolerable_ber")
    curve = BERCurve(tuple(points), torch.tensor(accuracy, dtype=torch.float64), 0.9 - rate, axis)
    return write_result(job, measured, curve, settings, seconds=60 * (1 + rate))


def finish_with(folder, rate, seed, curves, measured=None):
    """A finished job with these curves and metrics, any number of them."""
    job, settings = begin(folder, rate, seed)
    return write_result(job, measured or {}, curves, settings, seconds=1.0)


def sweep(folder, rates=(0.0, 0.05, 0.1, 0.2), seeds=(0, 1, 2), loss=None):
    """All combinations, finished."""
    for rate in rates:
        for seed in seeds:
            finish(folder, rate, seed, loss)
    return folder


def fail(folder, rate, seed, error=None):
    """A job that failed."""
    job, _ = begin(folder, rate, seed)
    fail_job(job, ValueError("the reason") if error is None else error)
    return job
