"""Tables and figures of finished runs: of one, and of all runs of a sweep.

    python -m bnnft.report multirun/2026-01-31/12-00-00

reads the ``metrics.json`` of every job in the folder and writes ``results.csv``, ``report.md`` and
``accuracy_over_ber.png`` and ``.svg`` beside them.
"""

import argparse
import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

from bnnft.evaluation import BERCurve
from bnnft.plots import axes

_FILE = "metrics.json"
_LAYER_COLUMNS = {
    "margin": "margin",
    "margin_normalized": "normalized margin",
    "margin_below_2": "margin below 2",
    "class_margin": "class margin",
    "importance_variance": "importance variance",
    "importance_cv": "importance CV",
}


@dataclass(frozen=True)
class Result:
    """What one run left.

    Attributes:
        folder: where it ran.
        metrics: last value of everything it logged.
        curve: accuracy over BER, if it was measured.
        overrides: the settings of its command line.
    """

    folder: Path
    metrics: Mapping[str, float]
    curve: BERCurve | None = None
    overrides: tuple[str, ...] = ()


def write_result(folder: Path, metrics: Mapping[str, float], curve: BERCurve | None, config: Any) -> Result:
    """Write ``metrics.json`` into the folder of a run, whole or not at all."""
    content: dict[str, Any] = {"metrics": dict(metrics), "curve": None, "config": config}
    if curve is not None:
        content["curve"] = {
            "axis": curve.axis,
            "rates": curve.rates,
            "accuracy": curve.accuracy.tolist(),
            "clean": curve.clean,
        }
    scratch = folder / f"{_FILE}.part"
    scratch.write_text(json.dumps(content, indent=1))
    scratch.replace(folder / _FILE)
    return Result(folder, metrics, curve)


def read_result(folder: Path) -> Result:
    """Read what :func:`write_result` wrote, with the run's overrides where Hydra left them."""
    content = json.loads((folder / _FILE).read_text())
    curve = content["curve"]
    if curve is not None:
        accuracy = torch.tensor(curve["accuracy"], dtype=torch.float64)
        curve = BERCurve(tuple(curve["rates"]), accuracy, curve["clean"], curve["axis"])
    overrides = folder / ".hydra" / "overrides.yaml"
    said = tuple(map(str, OmegaConf.load(overrides))) if overrides.exists() else ()
    return Result(folder, content["metrics"], curve, said)


def read_sweep(folder: Path) -> list[Result]:
    """Read all results below a folder.

    Raises:
        FileNotFoundError: there is no such folder, or no result in it.
    """
    results = [read_result(path.parent) for path in sorted(folder.rglob(_FILE))]
    if not results:
        raise FileNotFoundError(f"no {_FILE} below {str(folder)!r}: name the folder of a run or of a sweep")
    return results


def labels(results: Sequence[Result]) -> list[str]:
    """Return for each result the overrides that it does not share with all others."""
    shared = set.intersection(*(set(result.overrides) for result in results))
    return [", ".join(o for o in result.overrides if o not in shared) or result.folder.name for result in results]


def run_tables(result: Result) -> list[Table]:
    """Return the tables of one run: accuracy over BER, and the neurons of each layer."""
    tables = []
    if (curve := result.curve) is not None:
        clean = f"clean accuracy {_percent(curve.clean)} %"
        tolerable = result.metrics.get("test/tolerable_ber")
        title = clean if tolerable is None else f"{clean}, tolerable BER {_percent(tolerable)} %"
        table = Table(title=title, title_justify="left", box=box.SIMPLE, collapse_padding=True, pad_edge=False)
        for column in ("BER (%)" if curve.axis == "rate" else curve.axis, "accuracy (%)", "95 % interval", "std"):
            table.add_column(column, justify="right")
        for rate, mean, (low, high), std in zip(curve.rates, curve.mean, curve.interval, curve.std, strict=True):
            shown = f"{100 * rate:g}" if curve.axis == "rate" else f"{rate:g}"
            table.add_row(shown, _percent(mean), f"{_percent(low)} to {_percent(high)}", _percent(std))
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


Rows = tuple[list[str], list[list[str]]]


def accuracy_rows(results: Sequence[Result]) -> Rows:
    """Return header and a row for each run: accuracy in percent, clean and at each rate, and the tolerable BER."""
    rates = sorted({rate for result in results if result.curve for rate in result.curve.rates})
    rows = []
    for label, result in zip(labels(results), results, strict=True):
        means = dict(zip(result.curve.rates, result.curve.mean, strict=True)) if result.curve else {}
        clean = result.curve.clean if result.curve else result.metrics.get("test/acc", math.nan)
        tolerable = result.metrics.get("test/tolerable_ber", math.nan)
        row = [label, _percent(clean), *(_percent(means.get(rate, math.nan)) for rate in rates), _percent(tolerable)]
        rows.append(row)
    return ["run", "clean", *(f"{100 * rate:g} %" for rate in rates), "tolerable BER"], rows


def neuron_rows(results: Sequence[Result]) -> Rows:
    """Return header and a row for each run: margin, importance CV and variance of each layer."""
    layers = dict.fromkeys(layer for result in results for layer in layer_metrics(result.metrics))
    keys = [(key, layer) for key in ("margin", "importance_cv", "importance_variance") for layer in layers]
    keys = [(key, layer) for key, layer in keys if any(f"test/{key}/{layer}" in r.metrics for r in results)]
    rows = []
    for label, result in zip(labels(results), results, strict=True):
        values = (result.metrics.get(f"test/{key}/{layer}", math.nan) for key, layer in keys)
        rows.append([label, *(f"{value:.3g}" for value in values)])
    return ["run", *(f"{_LAYER_COLUMNS[key]} {layer}" for key, layer in keys)], rows


def write_report(folder: Path) -> list[Path]:
    """Write tables and figure of all results below a folder; returns the files."""
    results = read_sweep(folder)
    parts = [accuracy_rows(results), neuron_rows(results)]
    table = folder / "results.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(parts[0][0] + parts[1][0][1:])
        writer.writerows(left + right[1:] for left, right in zip(parts[0][1], parts[1][1], strict=True))
    text = "\n\n".join(_markdown(*part) for part in parts)
    page = folder / "report.md"
    page.write_text(f"# {folder.name}\n\nAccuracies in %.\n\n{text}\n\n![accuracy over BER](accuracy_over_ber.svg)\n")
    figure, ax = axes()
    for label, result in zip(labels(results), results, strict=True):
        if result.curve is not None:
            result.curve.plot(ax, label)
    figures = [folder / f"accuracy_over_ber.{suffix}" for suffix in ("svg", "png")]
    for path in figures:
        figure.savefig(path, dpi=150)
    return [table, page, *figures]


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def _percent(fraction: float) -> str:
    return "" if math.isnan(fraction) else f"{100 * fraction:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report of a folder and print its table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bnnft.report", description="Tables and figures of a sweep.")
    parser.add_argument("folder", type=Path, help="of a sweep, for example multirun/2026-01-31/12-00-00")
    folder = parser.parse_args(arguments).folder
    try:
        files = write_report(folder)
    except FileNotFoundError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    results = read_sweep(folder)
    console = Console(width=None if sys.stdout.isatty() else 160)
    for header, rows in (accuracy_rows(results), neuron_rows(results)):
        table = Table()
        for column in header:
            table.add_column(column, no_wrap=column == "run", justify="left" if column == "run" else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for path in files:
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
