"""What reaches the W&B run of a job, read back from the file that `wandb sync` would send."""

import json
import os
import signal
from itertools import groupby
from types import SimpleNamespace

import pytest
from commands import QUICK, run
from offline_run import column, read
from omegaconf import OmegaConf
from recorded import Plain, WithExperiment

from bnnft.train.job import found_best, sizes
from bnnft.train.tracking import built_loggers, define_summaries, describe, finished, summarize, wandb_folder

STOP = "+callbacks.stop._target_=stop_job.Stop"  # does nothing, unless the environment says so
RATES = ["0.001", "0.002", "0.003", "-1"]
SWEEP = ["-m", *QUICK, STOP, "name=tracked", f"optimizer.lr={','.join(RATES)}"]


def wandb():
    logger = WithExperiment("define_metric", "finish", "save", "log")
    logger.experiment.summary = {}
    return logger


def runs(folder):
    """Parts of each run by its id, in the order in which they were made."""
    parts = sorted((folder / "wandb").glob("offline-run-*"), key=lambda part: (part.name.split("-")[-1], part.name))
    found = groupby(parts, key=lambda part: part.name.split("-")[-1])
    return {name: [read(part) for part in each] for name, each in found}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of four jobs, of which the second is cut and resumed, and the last fails."""
    folder = tmp_path_factory.mktemp("tracked")
    done = run(folder, *SWEEP, STOP_JOB="SIGTERM:optimizer.lr=0.002")
    assert done.returncode == 128 + signal.SIGTERM
    done = run(folder, *SWEEP)
    assert done.returncode == 1
    found = {parts[-1]["config"]["optimizer"]["lr"]: parts for parts in runs(folder).values()}
    return folder, {str(rate): parts for rate, parts in found.items()}


def test_each_job_has_one_run_and_one_that_was_cut_goes_on_in_it(swept):
    _, found = swept
    assert {rate: len(parts) for rate, parts in found.items()} == {"0.001": 1, "0.002": 2, "0.003": 1, "-1": 1}
    assert [part["exit"] for rate in RATES for part in found[rate]] == [0, 143, 0, 0, 1]
    (whole,), (cut, rest) = found["0.001"], found["0.002"]
    assert "SIGTERM" in cut["summary"]["error"]
    assert rest["summary"]["starts"] == 2
    assert min(column(rest, "_step")) >= 10**6 > max(column(cut, "_step"))  # no row takes the place of another one
    for metric in ("val/acc_faulty", "test/acc_over_ber"):
        assert len(column(whole, metric)) == len(column(cut, metric) + column(rest, metric))


def test_a_failed_run_says_why(swept):
    _, found = swept
    (failed,) = found["-1"]
    assert failed["summary"]["error"] == "ValueError: Invalid learning rate: -1"
    text = (failed["dir"] / "files" / "traceback.txt").read_text()
    assert text.startswith("Traceback")
    assert "Invalid learning rate: -1" in text


def test_a_run_has_its_overrides_its_best_checkpoint_and_its_sizes(swept):
    folder, found = swept
    for rate in RATES[:3]:
        run, job = found[rate][-1], next((folder / "multirun" / "tracked").glob(f"*optimizer.lr={rate},*"))
        result = json.loads((job / "metrics.json").read_text())["metrics"]
        summary = run["summary"]
        assert f"optimizer.lr={rate}" in run["config"]["overrides"]
        assert summary["best/val/acc_faulty"] == result["val/acc_faulty"]
        assert summary["val/acc_faulty"]["max"] == max(value for part in found[rate] for value in column(part, FAULTY))
        assert (summary["best/step"], summary["best/epoch"]) in {(20, 0), (40, 1), (21, 0), (42, 1)}
        assert (job / summary["best/checkpoint"]).is_file()
        assert summary["bits"] == 64 * 64 + 64 * 32 + 32 * 10
        assert summary["parameters"] > summary["bits"]
        assert run["job_type"] == "train"


FAULTY = "val/acc_faulty"


def test_runs_of_a_sweep_differ_by_no_path(swept):
    folder, found = swept
    assert all(str(folder) not in json.dumps(part["config"]) for parts in found.values() for part in parts)


def test_results_are_an_artifact(swept):
    _, found = swept
    (artifact,) = [each for each in found["0.003"][0]["artifacts"] if each["type"] == "results"]
    assert {"config.yaml", "metrics.json", "accuracy_over_ber.csv", "train.log"} <= {*artifact["files"]}
    assert found["-1"][0]["artifacts"] == []


def test_runs_are_ended_as_what_became_of_them(tmp_path):
    mine, other = wandb(), Plain()
    mine.experiment.dir = str(tmp_path)
    with pytest.raises(ValueError, match="why"), finished([other, mine]):
        raise ValueError("why")
    with finished([other, mine]):
        pass
    ends = [given for method, _, given in mine.experiment.calls if method == "finish"]
    assert ends == [{"exit_code": 1}, {"exit_code": 0}]
    assert mine.experiment.summary == {"error": "ValueError('why')"}
    assert wandb_folder([other, mine]) == tmp_path.parent
    mine.experiment.dir = lambda: None  # the stand-in that other processes have
    assert wandb_folder([mine]) is None
    with finished([mine]):
        pass
    assert len([method for method, _, _ in mine.experiment.calls if method == "finish"]) == 2


def test_a_logger_without_an_experiment_gets_settings_and_overrides_alone(tmp_path):
    mine = Plain()
    describe([mine], {"seed": 0, "output_dir": str(tmp_path)}, tmp_path)
    define_summaries([mine], {"val/acc": "max"})
    summarize([mine], {"bits": 1})
    with finished([mine]):
        pass
    assert mine.settings == [{"seed": 0, "output_dir": "<folder>", "overrides": []}]
    assert wandb_folder([mine]) is None


def test_in_a_sweep_that_wandb_leads_the_settings_of_a_group_are_kept_beside_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    mine = wandb()
    describe([mine], {"dataset": {"batch_size": 64}}, tmp_path)
    assert mine.settings[0]["settings"] == {"dataset": {"batch_size": 64}}


@pytest.mark.parametrize(("starts", "resumed", "rows"), [(1, False, 0), (2, False, 1), (2, True, 0)])
def test_only_a_run_that_goes_on_offline_moves_its_steps(starts, resumed, rows, tmp_path):
    mine = wandb()
    mine.experiment.resumed = resumed
    describe([mine], {}, tmp_path, starts)
    logged = [given for method, _, given in mine.experiment.calls if method == "log"]
    assert logged == [{"step": 10**6}] * rows


class WandbLogger(Plain):
    """Keeps the arguments that it is built with."""

    def __init__(self, **arguments):
        super().__init__()
        self.arguments = arguments


@pytest.mark.parametrize(
    ("variable", "argument"),
    [("WANDB_PROJECT", "project"), ("WANDB_NAME", "name"), ("WANDB_RUN_ID", "id"), ("WANDB_TAGS", "tags")],
)
def test_variables_of_wandb_win_over_the_config(variable, argument, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    entry = {"_target_": f"{__name__}.WandbLogger", "project": "mine", "tags": ["a"], "name": None}
    entries = OmegaConf.create({"wandb": entry, "none": None})
    (built,) = built_loggers(entries, "bnnft", "1234")
    assert built.arguments == {"project": "mine", "tags": ["a"], "name": "bnnft", "id": "1234"}
    monkeypatch.setenv(variable, "theirs")
    (built,) = built_loggers(entries, "bnnft", "1234")
    assert built.arguments[argument] is None
    assert len([value for value in built.arguments.values() if value is None]) == 1


def test_loggers_of_other_kinds_are_built_as_they_are():
    entries = OmegaConf.create({"mine": {"_target_": "recorded.Plain"}})
    assert type(built_loggers(entries, "bnnft", "1234")[0]).__name__ == "Plain"
    assert built_loggers(None, "bnnft", "1234") == []


def test_without_a_best_checkpoint_there_is_none_to_name(tmp_path):
    assert found_best(None, tmp_path) == {}
    assert found_best(SimpleNamespace(best_model_path="", monitor="a"), tmp_path) == {}
    unmonitored = SimpleNamespace(best_model_path=str(tmp_path / "a" / "b.ckpt"), monitor=None, best_at={"step": 3})
    assert found_best(unmonitored, tmp_path) == {"best/checkpoint": "a/b.ckpt", "best/step": 3}


def test_sizes_of_a_network_without_binarized_weights():
    import torch

    assert sizes(torch.nn.Linear(3, 2)) == {"bits": 0, "parameters": 8}
