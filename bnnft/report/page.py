"""The interactive page of a report: one file that works without a network."""

import html
import importlib.resources
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bnnft.evaluation.curve import student
from bnnft.plots import axis_scale, axis_title, axis_values
from bnnft.report.groups import settings_of, varied
from bnnft.runs.curves import CurveKind, curve_kinds
from bnnft.runs.job import Job, labels
from bnnft.runs.tables import layer_metrics


def write_page(
    path: Path, title: str, jobs: Sequence[Job], faults: Sequence[str], group: str, values: Sequence[str]
) -> Path | None:
    """Write the interactive page, if plotly is there: it draws, and its code goes into the page."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return None
    files = importlib.resources.files("bnnft.report")
    parts = {"plotly": get_plotlyjs(), "script": (files / "page.js").read_text(), "title": html.escape(title)}
    # no text of a run may end the script that holds it, or open a comment there
    data = page_data(jobs, faults, group, values)
    parts["data"] = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    # all at once: what is put in may look like a place for something else
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], (files / "page.html").read_text())
    path.write_text(page)
    return path


def page_data(jobs: Sequence[Job], faults: Sequence[str], group: str, values: Sequence[str]) -> dict[str, Any]:
    """Return what the page shows; the first kind of curve with the rest, others in ``further``."""
    settings, kinds = settings_of(jobs), curve_kinds(jobs)
    names = varied(settings)
    if group not in names and group != "run":
        names = [group, *names]
        settings = [own | {group: value} for own, value in zip(settings, values, strict=True)]
    layers = [layer_metrics(job.result.metrics) if job.result else {} for job in jobs]
    entries = [
        _entry(job, label, own, layer, kinds)
        for job, label, own, layer in zip(jobs, labels(jobs), settings, layers, strict=True)
    ]
    first, *further = [_kind(kind, jobs) for kind in kinds]
    return first | {
        "further": further,
        "jobs": entries,
        "keys": names,
        "group": group,
        "layers": list(dict.fromkeys(name for layer in layers for name in layer)),
        "metrics": list(dict.fromkeys(name for layer in layers for values in layer.values() for name in values)),
        "faults": list(faults),
        "student": [student(freedom) for freedom in range(1, 31)],
    }


def _kind(kind: CurveKind, jobs: Sequence[Job]) -> dict[str, Any]:
    """Return what the page needs of a kind of curve."""
    curves = [curve for job in jobs if (curve := kind.of(job.result)) is not None]
    rates = sorted({rate for curve in curves for rate in curve.rates})
    low, high = (curves[0].bounds if curves else None) or (0.0, 1.0)
    return {
        "key": kind.key,
        "called": kind.key or kind.names.over,
        "score": kind.names.score.replace("_", " "),
        "score_title": kind.score_title,
        "percent": kind.percent,
        "lower_is_better": kind.higher_is_better is False,
        "bounds": [_finite(low), _finite(high)],
        "axis": axis_title(kind.names.axis),
        "scale": axis_scale(kind.names.axis),
        "tolerable": kind.tolerable_title,
        "rates": rates,
        "at": axis_values(kind.names.axis, rates),
    }


def _entry(
    job: Job, label: str, settings: Mapping[str, str], layers: Mapping[str, Mapping[str, float]], kinds: list[CurveKind]
) -> dict[str, Any]:
    """Return what the page needs of a run; a value that is not finite counts as missing."""
    entry: dict[str, Any] = {"label": label, "state": job.state, "error": job.error, "keys": settings}
    entry |= {"seconds": None, "curves": {}, "layers": {}}
    if (result := job.result) is None:
        return entry
    entry["seconds"] = result.seconds
    for kind in kinds:
        curve = kind.of(result)
        entry["curves"][kind.key] = {
            "clean": _finite(kind.clean(result)),
            "tolerable": _finite(kind.tolerable(result)),
            "bound": kind.bound(result),
            "rates": [] if curve is None else curve.rates,
            "values": [] if curve is None else [[_finite(value) for value in maps] for maps in curve.values.tolist()],
        }
    for layer, metrics in layers.items():
        entry["layers"][layer] = {name: value for name, value in metrics.items() if math.isfinite(value)}
    return entry


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
