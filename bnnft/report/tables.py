"""Tables of finished runs: of one for the screen, of several as rows."""

import math
import time
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from bnnft.plots import axis_scale, axis_title, axis_unit, axis_value, is_rate
from bnnft.runs.results import Job, Result, labels

_LAYER_COLUMNS = {
    "margin": "margin",
    "margin_normalized": "normalized margin",
    "margin_below_2": "margin below 2",
    "class_margin": "class margin",
    "importance_variance": "importance variance",
    "importance_cv": "importance CV",
}


def run_tables(result: Result) -> list[Table]:
    """Return the tables of one run: accuracy over BER, and the neurons of each layer."""
    tables = []
    if (curve := result.curve) is not None:
        title = f"clean accuracy {percent(curve.clean)} %"
        if tolerable := _tolerable_value(result, curve.axis):
            title = f"{title}, {_tolerable(curve.axis)} {tolerable} {axis_unit(curve.axis)}".rstrip()
        table = Table(title=title, title_justify="left", box=box.SIMPLE, collapse_padding=True, pad_edge=False)
        axis = "BER (%)" if curve.axis == "rate" else axis_title(curve.axis)
        for column in (axis, "accuracy (%)", "95 % interval", "std"):
            table.add_column(column, justify="right")
        for rate, mean, (low, high), std in zip(curve.rates, curve.mean, curve.interval, curve.std, strict=True):
            shown = f"{axis_scale(curve.axis) * rate:g}"
            table.add_row(shown, percent(mean), f"{percent(low)} to {percent(high)}", percent(std))
        tables.append(table)
    layers = layer_metrics(result.metrics)
    if layers:
        keys = [key for key in _LAYER_COLUMNS if any(key in values for values in layers.values())]
        table = Table(
            title="neurons of each layer (test data, clean weights)",
            title_justify="left",
            box=box.SIMPLE,
            collapse_padding=True,
            pad_edge=False,
        )
        for column in ("layer", *(_LAYER_COLUMNS[key] for key in keys)):
            table.add_column(column, justify="left" if column == "layer" else "right")
        for layer, values in layers.items():
            table.add_row(layer, *(f"{values[key]:.4g}" if key in values else "" for key in keys))
        tables.append(table)
    return tables


def layer_metrics(metrics: Mapping[str, float], stage: str = "test") -> dict[str, dict[str, float]]:
    """Return for each layer its metrics, from names like ``test/margin/fc1``."""
    layers: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        match name.split("/"):
            case [found, key, layer] if found == stage and key in _LAYER_COLUMNS:
                layers.setdefault(layer, {})[key] = value
    return layers


def job_table(jobs: Sequence[Job]) -> Table:
    """Return what became of the jobs of a sweep."""
    table = Table(
        title=f"{len(jobs)} jobs", title_justify="left", box=box.SIMPLE, collapse_padding=True, pad_edge=False
    )
    axis = common_axis(jobs)
    for column in ("job", "state", "clean (%)", tolerable_title(axis), "time", "error"):
        table.add_column(column, justify="left" if column in ("job", "state", "error") else "right", overflow="fold")
    for label, job in zip(labels(jobs), jobs, strict=True):
        values = ["", "", ""]
        if (result := job.result) is not None:
            values = [percent(result.clean), _tolerable_value(result, axis), duration(result.seconds)]
        table.add_row(label, job.state, *values, job.error)
    return table


def duration(seconds: float) -> str:
    """Return a time for people.

    Example:
        >>> duration(7), duration(65), duration(7300)
        ('7 s', '1:05 min', '2:01 h')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return time.strftime("%-M:%S min" if whole < 3600 else "%-H:%M h", time.gmtime(whole))


Rows = tuple[list[str], list[list[str]]]


def accuracy_rows(jobs: Sequence[Job]) -> Rows:
    """Return header and a row for each finished run: accuracy in percent, clean and at each rate, and tolerable BER."""
    finished, axis = _finished(jobs), common_axis(jobs)
    curves = [result.curve if result.axis == axis else None for _, result in finished]
    rates = sorted({rate for curve in curves if curve for rate in curve.rates})
    rows = []
    for (label, result), curve in zip(finished, curves, strict=True):
        means = dict(zip(curve.rates, curve.mean, strict=True)) if curve else {}
        shown = (result.clean, *(means.get(rate, math.nan) for rate in rates))
        rows.append([label, *map(percent, shown), _tolerable_value(result, axis)])
    return ["run", "clean", *(axis_value(axis, rate) for rate in rates), _tolerable(axis)], rows


def common_axis(jobs: Sequence[Job]) -> str:
    """Return which parameter of the error model the curves of these runs are over; the first where they differ."""
    return next((job.result.axis for job in jobs if job.result and job.result.curve), "rate")


def tolerable_title(axis: str) -> str:
    """Return what the tolerable value of such a parameter is called, with its unit.

    Example:
        >>> tolerable_title("rate"), tolerable_title("voltage")
        ('tolerable BER (%)', 'tolerable voltage (V)')
    """
    return axis_title(axis, _tolerable(axis))


def _tolerable(axis: str) -> str:
    return "tolerable BER" if axis == "rate" else f"tolerable {axis.replace('_', ' ')}"


def _tolerable_value(result: Result, axis: str) -> str:
    if result.axis != axis or math.isnan(result.tolerable):
        return ""
    return percent(result.tolerable) if is_rate(axis) else f"{result.tolerable:.3g}"


def neuron_rows(jobs: Sequence[Job]) -> Rows:
    """Return header and a row for each finished run: margin, importance CV and variance of each layer."""
    finished = _finished(jobs)
    layers = dict.fromkeys(layer for _, result in finished for layer in layer_metrics(result.metrics))
    keys = [(key, layer) for key in ("margin", "importance_cv", "importance_variance") for layer in layers]
    keys = [(key, layer) for key, layer in keys if any(f"test/{key}/{layer}" in r.metrics for _, r in finished)]
    rows = []
    for label, result in finished:
        values = (result.metrics.get(f"test/{key}/{layer}", math.nan) for key, layer in keys)
        rows.append([label, *(f"{value:.3g}" for value in values)])
    return ["run", *(f"{_LAYER_COLUMNS[key]} {layer}" for key, layer in keys)], rows


def _finished(jobs: Sequence[Job]) -> list[tuple[str, Result]]:
    """Return labels and results of the runs that are finished, told apart among themselves."""
    jobs = [job for job in jobs if job.result]
    return [(label, job.result) for label, job in zip(labels(jobs), jobs, strict=True) if job.result]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return rows as a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def percent(fraction: float) -> str:
    """Return a fraction in percent, nothing for NaN."""
    return "" if math.isnan(fraction) else f"{100 * fraction:.1f}"
