"""Tables for the terminal: the numbers of one run, and what became of the jobs of a sweep. No text is markup."""

import time
from collections.abc import Mapping, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bnnft.evaluation.curve import BERCurve
from bnnft.plots import axis_scale, axis_title, distinct_numbers
from bnnft.runs.curves import CurveKind, curve_kinds, kind_of
from bnnft.runs.job import Job, labels
from bnnft.runs.results import Result

LAYER_COLUMNS = {
    "margin": "margin",
    "margin_normalized": "normalized margin",
    "margin_below_2": "margin below 2",
    "class_margin": "class margin",
    "importance_variance": "importance variance",
    "importance_cv": "importance CV",
}


def run_tables(result: Result) -> list[Table]:
    """Return the tables of one run: a score over BER for each curve, and the neurons of each layer."""
    tables = [_curve_table(result, kind_of(key, curve), curve) for key, curve in result.curves.items()]
    layers = layer_metrics(result.metrics)
    if layers:
        found = dict.fromkeys(key for values in layers.values() for key in values)
        keys = sorted(found, key=lambda key: (key not in LAYER_COLUMNS, [*LAYER_COLUMNS, key].index(key)))
        table = _table("neurons of each layer (test data, clean weights)")
        for column in ("layer", *map(layer_title, keys)):
            table.add_column(column, justify="left" if column == "layer" else "right")
        for layer, values in layers.items():
            table.add_row(escape(layer), *(f"{values[key]:.4g}" if key in values else "" for key in keys))
        tables.append(table)
    return tables


def _table(title: str) -> Table:
    return Table(title=escape(title), title_justify="left", box=box.SIMPLE, collapse_padding=True, pad_edge=False)


def _curve_table(result: Result, kind: CurveKind, curve: BERCurve) -> Table:
    name, unit = f"{kind.key}: " if kind.key else "", " %" if kind.percent else ""
    title = f"{name}clean {curve.score.replace('_', ' ')} {kind.score(curve.clean)}{unit}"
    if tolerable := kind.tolerable_text(result):
        title = f"{title}, {kind.tolerable_name} {tolerable} {kind.tolerable_unit}".rstrip()
    table = _table(title)
    axis = "BER (%)" if curve.axis == "rate" else axis_title(curve.axis)
    for column in (axis, escape(kind.score_title), "95 % interval", "std"):
        table.add_column(column, justify="right")
    shown = distinct_numbers([axis_scale(curve.axis) * rate for rate in curve.rates])
    for rate, mean, (low, high), std in zip(shown, curve.mean, curve.interval, curve.std, strict=True):
        table.add_row(rate, kind.score(mean), f"{kind.score(low)} to {kind.score(high)}", kind.score(std))
    return table


def layer_metrics(metrics: Mapping[str, float], stage: str = "test") -> dict[str, dict[str, float]]:
    """Return for each layer its metrics, from names like ``test/margin/fc1``."""
    layers: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        match name.split("/"):
            case [found, key, layer] if found == stage and callback_and_metric(key):
                layers.setdefault(layer, {})[key] = value
    return layers


def callback_and_metric(key: str) -> tuple[str, str] | None:
    """Return the name of a callback, nothing where it has none, and its metric of layers; ``None`` of other names.

    Example:
        >>> callback_and_metric("margin"), callback_and_metric("mine_class_margin"), callback_and_metric("loss")
        (('', 'margin'), ('mine', 'class_margin'), None)
    """
    for metric in sorted(LAYER_COLUMNS, key=len, reverse=True):  # the whole class_margin, not a callback named class
        if key == metric or key.endswith(f"_{metric}"):
            return key.removesuffix(metric).removesuffix("_"), metric
    return None


def layer_title(key: str) -> str:
    """Return what a metric of layers is called in tables."""
    name, metric = callback_and_metric(key) or ("", key)
    return f"{name} {LAYER_COLUMNS[metric]}".strip()


def job_table(jobs: Sequence[Job]) -> Table:
    """Return what became of the jobs of a sweep."""
    table, (kind, *_) = _table(f"{len(jobs)} jobs"), curve_kinds(jobs)
    clean = "clean (%)" if kind.percent else "clean"
    for column in ("job", "state", clean, kind.tolerable_title, "time", "error"):
        table.add_column(column, justify="left" if column in ("job", "state", "error") else "right", overflow="fold")
    for label, job in zip(labels(jobs), jobs, strict=True):
        values = ["", "", ""]
        if (result := job.result) is not None:
            values = [kind.score(kind.clean(result)), kind.tolerable_text(result), duration(result.seconds)]
        table.add_row(Text(label), job.state, *values, Text(job.error))
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
