"""Write the report of one or more sweeps: tables, static figures, and one page that works without a network."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bnnft.plots import axes, plot_curve
from bnnft.report.groups import grouping, in_groups, pooled, settings_of
from bnnft.report.page import write_page
from bnnft.report.tables import markdown, neuron_rows, plain, score_rows
from bnnft.runs.curves import CurveKind, curve_kinds, left_out
from bnnft.runs.job import Job, labels


def write_report(
    jobs: Sequence[Job], faults: Sequence[str], title: str, out: Path, group_by: str | None = None
) -> list[Path]:
    """Write the report of some runs; returns its files.

    Args:
        jobs: the runs, from :func:`bnnft.runs.job.read_jobs`.
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
    faults = [*faults, *left_out(jobs, labels(jobs))]
    out.mkdir(parents=True, exist_ok=True)
    files = [_write_csv(out / "results.csv", jobs), _write_markdown(out / "report.md", title, jobs, faults)]
    for kind, file in _files(jobs):
        files += _write_figures(out / file, key, jobs, values, kind)
    page = write_page(out / "report.html", title, jobs, faults, key, values)
    return files if page is None else [*files, page]


def _files(jobs: Sequence[Job]) -> Iterator[tuple[CurveKind, str]]:
    """Yield the kinds of curves, with the names of their figures."""
    for number, kind in enumerate(curve_kinds(jobs)):
        yield kind, kind.names.over if number else kind.names.file


def _write_csv(path: Path, jobs: Sequence[Job]) -> Path:
    """Write a row for each run, curve and rate."""
    settings = settings_of(jobs)
    rows: list[dict[str, Any]] = []
    for job, label, own in zip(jobs, labels(jobs), settings, strict=True):
        result = job.result
        first = {"run": label, **own, "state": job.state}
        if result is None or not result.curves:
            rows.append(first)
            continue
        measured = {name: value for name, value in result.metrics.items() if name.startswith("test/")}
        for curve in result.curves.values():
            points = zip(curve.rates, curve.mean, curve.std, curve.interval, strict=True)
            for rate, mean, std, (low, high) in points:
                point = {"curve": curve.names.over, curve.axis: rate, curve.score: mean, "std": std}
                point |= {"low": low, "high": high, "maps": curve.maps, "clean": curve.clean}
                rows.append(first | point | {"seconds": result.seconds} | measured)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return path


def _write_markdown(path: Path, title: str, jobs: Sequence[Job], faults: Sequence[str]) -> Path:
    parts, kinds = [f"# {plain(title)}"], list(_files(jobs))
    for kind, file in kinds:
        score = kind.names.score.replace("_", " ")
        if len(kinds) > 1:
            parts.append(f"## {plain(kind.key or kind.names.over)}")
        parts.append(
            "Accuracies in %." if kind.percent and score == "accuracy" else f"{kind.score_title}.".capitalize()
        )
        parts += [markdown(*score_rows(jobs, kind)), f"![{score} over BER]({file}.svg)"]
    parts.append(markdown(*neuron_rows(jobs)))
    missing = [f"{job.folder.name}: {job.state} {job.error}" for job in jobs if job.result is None]
    if missing or faults:
        parts.append("\n".join(["Missing:", "", *(f"- {plain(text)}" for text in [*missing, *faults])]))
    path.write_text("\n\n".join(parts) + "\n")
    return path


def _write_figures(path: Path, key: str, jobs: Sequence[Job], values: Sequence[str], kind: CurveKind) -> list[Path]:
    """Write the score over BER, a line for each group, for the screen and for papers."""
    figure, ax = axes()
    for value, results in in_groups(jobs, values):
        if any(kind.of(result) is not None for result in results):
            rates, means, intervals = pooled(results, kind)
            label, shown = f"{key}={value}" if value else None, (kind.higher_is_better, kind.percent)
            plot_curve(rates, means, intervals, ax, label, kind.names.axis, kind.names.score, *shown)
    files = [path.with_name(f"{path.name}.{suffix}") for suffix in ("svg", "pdf", "png")]
    for file in files:
        figure.savefig(file, dpi=150)
    return files
