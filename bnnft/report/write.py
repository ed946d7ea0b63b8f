"""Write the report of one or more sweeps: tables, static figures, and one page that works without a network."""

import csv
import html
import importlib.resources
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bnnft.evaluation.curve import student
from bnnft.plots import axes, axis_scale, axis_title, axis_value, plot_curve
from bnnft.report.groups import grouping, in_groups, pooled, settings_of, varied
from bnnft.report.tables import accuracy_rows, markdown, neuron_rows
from bnnft.runs.results import Job, labels
from bnnft.runs.tables import common_axis, layer_metrics, tolerable_title


def write_report(
    jobs: Sequence[Job], faults: Sequence[str], title: str, out: Path, group_by: str | None = None
) -> list[Path]:
    """Write the report of some runs; returns its files.

    Args:
        jobs: the runs, from :func:`bnnft.runs.results.read_jobs`.
        faults: what is wrong with those that could not be read.
        title: of the report.
        out: the folder to write to.
        group_by: the setting whose values make the groups of the figures; chosen if ``None``.

    Raises:
        ValueError: no run is finished, or there is no setting ``group_by``.
    """
    if not any(job.result for job in jobs):
        states = "; ".join([*(f"{job.folder.name}: {job.state} {job.error}".strip() for job in jobs), *faults])
        raise ValueError(f"none of {len(jobs) + len(faults)} runs is finished ({states})")
    key, values = grouping(jobs, group_by)
    faults = [*faults, *_other_axes(jobs)]
    out.mkdir(parents=True, exist_ok=True)
    files = [_write_csv(out / "results.csv", jobs), _write_markdown(out / "report.md", title, jobs, faults)]
    files += _write_figures(out, key, jobs, values)
    page = _write_page(out / "report.html", title, jobs, faults, key, values)
    return files if page is None else [*files, page]


def _other_axes(jobs: Sequence[Job]) -> list[str]:
    """Say which runs have a curve that can't be in one figure with the others."""
    axis, several = common_axis(jobs), zip(labels(jobs), jobs, strict=True)
    return [
        f"{label}: its curve is over {job.result.axis}, not {axis}; a report of its own shows it"
        for label, job in several
        if job.result and job.result.curve and job.result.axis != axis
    ]


def _write_csv(path: Path, jobs: Sequence[Job]) -> Path:
    """Write a row for each run and rate."""
    settings = settings_of(jobs)
    rows: list[dict[str, Any]] = []
    for job, label, own in zip(jobs, labels(jobs), settings, strict=True):
        result = job.result
        first = {"run": label, **own, "state": job.state}
        if result is None or result.curve is None:
            rows.append(first)
            continue
        curve = result.curve
        measured = {name: value for name, value in result.metrics.items() if name.startswith("test/")}
        points = zip(curve.rates, curve.mean, curve.std, curve.interval, strict=True)
        for rate, mean, std, (low, high) in points:
            point = {curve.axis: rate, "accuracy": mean, "std": std, "low": low, "high": high, "maps": curve.maps}
            rows.append(first | point | {"clean": curve.clean, "seconds": result.seconds} | measured)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return path


def _write_markdown(path: Path, title: str, jobs: Sequence[Job], faults: Sequence[str]) -> Path:
    parts = [f"# {title}", "Accuracies in %.", markdown(*accuracy_rows(jobs)), markdown(*neuron_rows(jobs))]
    missing = [f"- {job.folder.name}: {job.state} {job.error}".rstrip() for job in jobs if job.result is None]
    if missing or faults:
        parts.append("\n".join(["Missing:", "", *missing, *(f"- {fault}" for fault in faults)]))
    parts.append("![accuracy over BER](accuracy_over_ber.svg)")
    path.write_text("\n\n".join(parts) + "\n")
    return path


def _write_figures(folder: Path, key: str, jobs: Sequence[Job], values: Sequence[str]) -> list[Path]:
    """Write accuracy over BER, a line for each group, for the screen and for papers."""
    figure, ax = axes()
    axis = common_axis(jobs)
    for value, results in in_groups(jobs, values):
        same = [result for result in results if result.curve is not None and result.curve.axis == axis]
        if same:
            plot_curve(*pooled(same), ax, f"{key}={value}" if value else None, axis)
    files = [folder / f"accuracy_over_ber.{suffix}" for suffix in ("svg", "pdf", "png")]
    for path in files:
        figure.savefig(path, dpi=150)
    return files


def _write_page(
    path: Path, title: str, jobs: Sequence[Job], faults: Sequence[str], group: str, values: Sequence[str]
) -> Path | None:
    """Write the interactive page, if plotly is there: it draws, and its code goes into the page."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return None
    settings, axis = settings_of(jobs), common_axis(jobs)
    names = varied(settings)
    if group not in names and group != "run":
        names = [group, *names]
        settings = [own | {group: value} for own, value in zip(settings, values, strict=True)]
    layers = [layer_metrics(job.result.metrics) if job.result else {} for job in jobs]
    entries = [
        _entry(job, label, own, layer, axis)
        for job, label, own, layer in zip(jobs, labels(jobs), settings, layers, strict=True)
    ]
    rates = sorted({rate for entry in entries if entry["curve"] for rate in entry["curve"]["rates"]})
    data = {
        "jobs": entries,
        "keys": names,
        "group": group,
        "axis": axis_title(axis),
        "scale": axis_scale(axis),
        "tolerable": tolerable_title(axis),
        "rates": rates,
        "at": [axis_value(axis, rate) for rate in rates],
        "layers": list(dict.fromkeys(name for layer in layers for name in layer)),
        "metrics": list(dict.fromkeys(name for layer in layers for values in layer.values() for name in values)),
        "faults": list(faults),
        "student": [student(freedom) for freedom in range(1, 31)],
    }
    files = importlib.resources.files("bnnft.report")
    parts = {"plotly": get_plotlyjs(), "script": (files / "page.js").read_text(), "title": html.escape(title)}
    # no text of a run may end the script that holds it
    parts["data"] = json.dumps(data, allow_nan=False).replace("</", "<\\/")
    page = (files / "page.html").read_text()
    for name, text in parts.items():
        page = page.replace(f"{{{{{name}}}}}", text)
    path.write_text(page)
    return path


def _entry(
    job: Job, label: str, settings: Mapping[str, str], layers: Mapping[str, Mapping[str, float]], axis: str
) -> dict[str, Any]:
    """Return what the page needs of a run; a value that is not finite counts as missing."""
    entry: dict[str, Any] = {"label": label, "state": job.state, "error": job.error, "keys": settings}
    entry |= {"clean": None, "tolerable": None, "seconds": None, "curve": None, "layers": {}}
    if (result := job.result) is None:
        return entry
    curve = result.curve
    entry["seconds"] = result.seconds
    entry["clean"] = _finite(result.clean)
    if curve is not None and curve.axis == axis:
        entry["tolerable"] = _finite(result.tolerable)
        entry["curve"] = {"rates": curve.rates, "accuracy": curve.accuracy.tolist()}
    for layer, metrics in layers.items():
        entry["layers"][layer] = {name: value for name, value in metrics.items() if math.isfinite(value)}
    return entry


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
