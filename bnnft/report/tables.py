"""Tables of a report: a row for each finished run."""

import math
import re
from collections.abc import Sequence

from bnnft.plots import axis_values
from bnnft.runs.curves import CurveKind
from bnnft.runs.job import Job, labels
from bnnft.runs.results import Result
from bnnft.runs.tables import callback_and_metric, layer_metrics, layer_title

Rows = tuple[list[str], list[list[str]]]


def score_rows(jobs: Sequence[Job], kind: CurveKind) -> Rows:
    """Return header and a row for each finished run: the score, clean and at each rate, and the tolerable BER."""
    finished = _finished(jobs)
    curves = [kind.of(result) for _, result in finished]
    rates = sorted({rate for curve in curves if curve for rate in curve.rates})
    rows = []
    for (label, result), curve in zip(finished, curves, strict=True):
        means = dict(zip(curve.rates, curve.mean, strict=True)) if curve else {}
        shown = (kind.clean(result), *(means.get(rate, math.nan) for rate in rates))
        rows.append([label, *map(kind.score, shown), kind.tolerable_text(result)])
    return ["run", "clean", *axis_values(kind.names.axis, rates), kind.tolerable_name], rows


def neuron_rows(jobs: Sequence[Job]) -> Rows:
    """Return header and a row for each finished run: margin, importance CV and variance of each layer."""
    finished = _finished(jobs)
    found = [layer_metrics(result.metrics) for _, result in finished]
    layers = dict.fromkeys(layer for metrics in found for layer in metrics)
    names = dict.fromkeys(key for metrics in found for values in metrics.values() for key in values)
    wanted = ("margin", "importance_cv", "importance_variance")
    shown = [key for metric in wanted for key in names if (callback_and_metric(key) or ())[1:] == (metric,)]
    keys = [(key, layer) for key in shown for layer in layers if any(key in m.get(layer, {}) for m in found)]
    rows = []
    for label, result in finished:
        values = (result.metrics.get(f"test/{key}/{layer}", math.nan) for key, layer in keys)
        rows.append([label, *("" if math.isnan(value) else f"{value:.3g}" for value in values)])
    return ["run", *(f"{layer_title(key)} {layer}" for key, layer in keys)], rows


def _finished(jobs: Sequence[Job]) -> list[tuple[str, Result]]:
    """Return labels and results of the runs that are finished, told apart among themselves."""
    jobs = [job for job in jobs if job.result]
    return [(label, job.result) for label, job in zip(labels(jobs), jobs, strict=True) if job.result]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return rows as a Markdown table, in which no text is markup."""
    lines = [list(map(plain, line)) for line in [header, *rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], ["---"] * len(header), *lines[1:]])


def plain(text: str) -> str:
    r"""Return a text as Markdown shows it, whatever signs are in it.

    Example:
        >>> print(plain("{*fc1*: 0.1}|[x](y)"), plain("ber.rate_0_to_1=0"))
        {\*fc1\*: 0.1}\|\[x](y) ber.rate_0_to_1=0
    """
    return re.sub(r"([\\`*\[<|])", r"\\\1", " ".join(text.split()))
