"""Log what was measured on all processes together; what is more than a number, to every logger that can take it."""

import csv
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from bnnft.ber import ErrorModel
from bnnft.evaluation.curve import BERCurve
from bnnft.metrics import Histogram
from bnnft.plots import axis_name

_said: WeakKeyDictionary[Trainer, set[str]] = WeakKeyDictionary()
_lines: WeakKeyDictionary[Logger, Counter[str]] = WeakKeyDictionary()  # how many curves of each name were logged


def say_once(trainer: Trainer, key: str, text: str, say: Callable[[str], Any] = rank_zero_info) -> bool:
    """Say something once in the life of a trainer; returns whether it was said now."""
    said = _said.setdefault(trainer, set())
    if key in said:
        return False
    said.add(key)
    say(text)
    return True


def quiet() -> None:
    """Let Lightning's log show warnings, and what this package says, alone."""

    def is_worth_reading(record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO or Path(record.pathname).is_relative_to(Path(__file__).parent)

    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(is_worth_reading)


def announce(trainer: Trainer, error_model: ErrorModel) -> None:
    """Say rate and source of an error model that has a source, and log both with the run's config."""
    source, name = getattr(error_model, "source", ""), repr(error_model)
    rate = getattr(error_model, "rate", None)
    shown = "" if rate is None else f"bit error rate {100 * rate:.3g} %, "
    if source and say_once(trainer, name, f"{name}: {shown}from {source}"):
        for logger in trainer.loggers:
            logger.log_hyperparams({"error_model": {"model": name, "rate": rate, "source": source}})


def _has(logger: Any, method: str) -> bool:
    return callable(getattr(getattr(logger, "experiment", None), method, None))


def short_names(layers: Sequence[str]) -> dict[str, str]:
    """Return names for the log, each another one: without the prefix that all layers share, and without dots.

    Example:
        >>> short_names(["model.fc1", "model.block.fc"])
        {'model.fc1': 'fc1', 'model.block.fc': 'block_fc'}
        >>> short_names(["block.fc", "block_fc"])
        {'block.fc': 'block-fc', 'block_fc': 'block_fc'}
    """
    parts = {layer: layer.split(".") for layer in layers}
    shared = 0
    while all(len(part) > shared + 1 for part in parts.values()) and len({p[shared] for p in parts.values()}) == 1:
        shared += 1
    names: dict[str, str] = {}
    for layer in sorted(parts, key=lambda layer: len(parts[layer])):  # a name without dots stays as it is
        joined = [sign.join(parts[layer][shared:]) for sign in ("_", "-")]
        candidates = chain(joined, (f"{joined[1]}-{number}" for number in count(2)))
        names[layer] = next(name for name in candidates if name not in names.values())
    return {layer: names[layer] for layer in layers}


def log_merged(pl_module: LightningModule, values: Mapping[str, float | Tensor], prog_bar: bool = False) -> None:
    """Log numbers that are merged over processes already."""
    # their maximum is each of them; not asking for any reduction makes Lightning warn about every single one
    pl_module.log_dict(dict(values), prog_bar=prog_bar, sync_dist=True, reduce_fx="max")


def log_histograms(trainer: Trainer, histograms: dict[str, Histogram]) -> None:
    """Log histograms to W&B and TensorBoard; other loggers have none."""
    loggers: list[Any] = trainer.loggers if histograms else []
    for logger in loggers:
        if _has(logger, "define_metric"):  # W&B: this is what wandb.Histogram becomes in a record
            bars = {key: histogram.trimmed(64) for key, histogram in histograms.items()}
            values: dict[str, Any] = {
                key: {"_type": "histogram", "values": bar.counts.tolist(), "bins": bar.edges.tolist()}
                for key, bar in bars.items()
            }
            logger.log_metrics(values, step=trainer.global_step)
        elif _has(logger, "add_histogram_raw"):
            for key, histogram in histograms.items():
                _add_raw(logger.experiment, key, histogram.trimmed(64), trainer.global_step)


def _add_raw(writer: Any, key: str, histogram: Histogram, step: int) -> None:
    counts, edges = histogram.counts.double(), histogram.edges.double()
    middles = (edges[:-1] + edges[1:]) / 2
    writer.add_histogram_raw(
        key,
        min=float(edges[0]),
        max=float(edges[-1]),
        num=int(counts.sum()),
        sum=float((counts * middles).sum()),
        sum_squares=float((counts * middles.square()).sum()),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )


def log_neurons(trainer: Trainer, stage: str, neurons: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Log values of single neurons, by metric and layer, as a table for each metric to the loggers that take one."""
    loggers: list[Any] = [logger for logger in trainer.loggers if hasattr(logger, "log_table")]
    for key, layers in neurons.items() if loggers else ():
        columns = ["layer", "neuron", key]
        rows = [
            [layer, neuron, value]
            for layer, values in layers.items()
            for neuron, value in enumerate(values.flatten().tolist())
        ]
        for logger in loggers:
            logger.log_table(f"{stage}/{key}", columns=columns, data=rows)


def curve_numbers(curve: BERCurve, drop: float) -> dict[str, float]:
    """Return the numbers of a curve by their names."""
    values = dict(zip(curve.names.points(curve.rates), curve.mean, strict=True))
    if curve.higher_is_better is not None:
        values[curve.names.tolerable] = curve.tolerable_ber(drop)
        values[f"{curve.names.tolerable}_is_lower_bound"] = float(curve.is_lower_bound(drop))
    return values


def log_curve(trainer: Trainer, stage: str, curve: BERCurve) -> None:
    """Log a score over BER: as rows with the rate as their own x axis, as a table and as a figure.

    A second curve of a name is another line in W&B, ``..._2``.
    """
    axis, name = axis_name(curve.axis), f"{stage}/{curve.names.over}"
    loggers: list[Any] = trainer.loggers
    for logger in loggers:
        lines = _lines.setdefault(logger, Counter())
        lines[name] += 1
        key = name if lines[name] == 1 else f"{name}_{lines[name]}"
        own_axis = _has(logger, "define_metric")  # W&B
        if own_axis:
            # exact names: a glob here would compete with the logger's own for every metric
            logger.experiment.define_metric(axis, hidden=True)
            logger.experiment.define_metric(key, step_metric=axis, summary="none")
        if not _has(logger, "add_figure"):  # TensorBoard has no x axis but the step
            for point, (rate, mean) in enumerate(zip(curve.rates, curve.mean, strict=True)):
                step = trainer.global_step if isinstance(logger, CSVLogger) else None if own_axis else point
                logger.log_metrics({axis: rate, key: mean}, step=step)
        if hasattr(logger, "log_table"):
            columns, rows = curve_table(curve)
            logger.log_table(f"{stage}/{curve.names.table}", columns=columns, data=rows)
        log_figure(logger, f"{stage}/{curve.names.figure}", curve.plot()[0], trainer.global_step)


def log_figure(logger: Any, key: str, figure: Any, step: int) -> None:
    """Log a matplotlib figure where the logger takes one."""
    if hasattr(logger, "log_image"):
        logger.log_image(key, [figure])
    elif _has(logger, "add_figure"):
        logger.experiment.add_figure(key, figure, global_step=step)


def curve_table(curve: BERCurve) -> tuple[list[str], list[list[float | bool | None]]]:
    """Return column names and rows of a curve: rate, mean score, deviation, 95 % interval, direction, then each map."""
    maps = [f"map_{number}" for number in range(curve.maps)]
    columns = [axis_name(curve.axis), curve.score, "std", "low", "high", "higher_is_better", *maps]
    points = zip(curve.rates, curve.mean, curve.std, curve.interval, curve.values.tolist(), strict=True)
    rows = [
        [rate, mean, std, *interval, curve.higher_is_better, *values] for rate, mean, std, interval, values in points
    ]
    return columns, [[None if value is None or math.isnan(value) else value for value in row] for row in rows]


def save_curve(curve: BERCurve, folder: Path) -> None:
    """Write a curve as ``accuracy_over_ber.csv``, ``.png`` and ``.svg`` into a folder, or under its own name."""
    folder.mkdir(parents=True, exist_ok=True)
    columns, rows = curve_table(curve)
    with (folder / f"{curve.names.file}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    figure, _ = curve.plot()
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"{curve.names.file}.{suffix}", dpi=150)


@contextmanager
def unlogged(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Drop what a step of the module logs inside of the context."""
    loggers = trainer.loggers
    own = {key: value for key, value in vars(module).items() if key in ("log", "log_dict")}
    try:
        trainer.loggers = [DummyLogger() for _ in loggers]
        vars(module).update(dict.fromkeys(("log", "log_dict"), lambda *args, **kwargs: None))
        yield
    finally:
        trainer.loggers = loggers
        for name in ("log", "log_dict"):
            vars(module).pop(name, None)
        vars(module).update(own)
