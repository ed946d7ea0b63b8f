"""Tables for the terminal: the numbers of one run, and what became of the jobs of a sweep."""

import math
import time
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from bnnft.plots import axis_scale, axis_title, axis_unit, is_rate
from bnnft.runs.results import Job, Result, labels

LAYER_COLUMNS = {
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
        if tolerable := tolerable_value(result, curve.axis):
            title = f"{title}, {tolerable_name(curve.axis)} {tolerable} {axis_unit(curve.axis)}".rstrip()
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
        keys = [key for key in LAYER_COLUMNS if any(key in values for values in layers.values())]
        table = Table(
            title="neurons of each layer (test data, clean weights)",
            title_justify="left",
            box=box.SIMPLE,
            collapse_padding=True,
            pad_edge=False,
        )
        for column in ("layer", *(LAYER_COLUMNS[key] for key in keys)):
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
            case [found, key, layer] if found == stage and key in LAYER_COLUMNS:
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
            values = [percent(result.clean), tolerable_value(result, axis), duration(result.seconds)]
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


def common_axis(jobs: Sequence[Job]) -> str:
    """Return which parameter of the error model the curves of these runs are over; the first where they differ."""
    return next((job.result.axis for job in jobs if job.result and job.result.curve), "rate")


def tolerable_title(axis: str) -> str:
    """Return what the tolerable value of such a parameter is called, with its unit.

    Example:
        >>> tolerable_title("rate"), tolerable_title("voltage")
        ('tolerable BER (%)', 'tolerable voltage (V)')
    """
    return axis_title(axis, tolerable_name(axis))


def tolerable_name(axis: str) -> str:
    """Return what the tolerable value of such a parameter is called, without its unit."""
    return "tolerable BER" if axis == "rate" else f"tolerable {axis.replace('_', ' ')}"


def tolerable_value(result: Result, axis: str) -> str:
    """Return the tolerable value of a run for a table, nothing where it is not known."""
    if result.axis != axis or math.isnan(result.tolerable):
        return ""
    return percent(result.tolerable) if is_rate(axis) else f"{result.tolerable:.3g}"


def percent(fraction: float) -> str:
    """Return a fraction in percent, nothing for NaN."""
    return "" if math.isnan(fraction) else f"{100 * fraction:.1f}"
