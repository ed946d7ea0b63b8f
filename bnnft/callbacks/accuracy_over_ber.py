"""Measure accuracy under bit errors while Lightning evaluates."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from bnnft.ber import ErrorModel, Key
from bnnft.evaluation.accuracy import AccuracyMeter, checked_maps, classified_correctly, error_models
from bnnft.evaluation.curve import BERCurve, checked_drop
from bnnft.injection.activation import Target, checked_target
from bnnft.injection.sites import Weights
from bnnft.loggers import announce, curve_table, log_curve, log_merged
from bnnft.plots import axis_name


class AccuracyOverBER(Callback):
    """Measure accuracy over BER at test: all rates and fault maps in one pass over the test data.

    Logs ``test/acc_ber_0p01`` and so on (mean over maps), ``test/tolerable_ber``, and to loggers that can show it
    the curve with its own x axis, as a table and as a figure. With an error model of its own it also logs
    ``val/acc_faulty`` at validation: the accuracy under this error model, as it is. The last curve stays in
    :attr:`curve`. Data of several loaders count together. Values of samples: processes merge exactly.

    Args:
        rates: strictly ascending bit error rates in [0, 1]; values of another parameter from the fewest errors to the
            most (voltages from the highest down).
        maps: fault maps at each rate, >= 1. A fixed chip has one, which is run once however many are asked for.
        error_model: whose parameter ``axis`` takes the rates; independent flips if ``None``.
        axis: the parameter of the error model that ``rates`` sets; with ``axis="voltage"`` it logs
            ``test/acc_voltage_0p55`` and so on.
        seed: of the fault maps, >= 0; the same as ``seed`` of :func:`bnnft.flipped`.
        drop: of accuracy that ``test/tolerable_ber`` allows, a fraction.
        validation_maps: fault maps of ``val/acc_faulty``, >= 1.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.
        target: flip ``"weights"``, ``"activations"`` (anew in each batch) or ``"both"``.
        activations: patterns of the names of modules that put out two values; all known ones (of bnnft.nn, brevitas and
            bitorch) if ``None``.
        correct: ``correct(module, batch)`` returns a bool for each answer; without it batches are
            ``(inputs, targets)`` and ``module(inputs)`` returns class scores.
        save_dir: folder for the curve as ``accuracy_over_ber.csv``, ``.png`` and ``.svg``; none if ``None``.

    Raises:
        TypeError, ValueError: an argument is out of range; at the start, the model has no such weights.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[AccuracyOverBER([0, 0.01, 0.1])], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        rates: Sequence[float],
        maps: int = 5,
        *,
        error_model: ErrorModel | None = None,
        axis: str = "rate",
        seed: int = 0,
        drop: float = 0.01,
        validation_maps: int = 1,
        weights: Weights | None = None,
        target: Target = "weights",
        activations: Sequence[str] | None = None,
        correct: Callable[[nn.Module, Any], Tensor] | None = None,
        save_dir: str | None = None,
    ) -> None:
        self._models = error_models(rates, error_model, axis)
        checked_maps(maps)
        checked_maps(validation_maps)
        checked_drop(drop)
        checked_target(target)
        Key(seed)  # raises if the seed is none
        self.rates, self.maps, self.error_model, self.axis = list(rates), maps, error_model, axis
        self.seed, self.drop, self.validation_maps, self.weights = seed, drop, validation_maps, weights
        self.target, self.activations = target, activations
        self.correct = classified_correctly if correct is None else correct
        self.save_dir = None if save_dir is None else Path(save_dir)
        self.curve: BERCurve | None = None
        self._meter: AccuracyMeter | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say what published figures the flips stand for."""
        if self.error_model is not None:
            announce(trainer, self.error_model)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the fault maps of the error model itself."""
        if self.error_model is not None and not trainer.sanity_checking:
            self._start(pl_module, [self.error_model], self.validation_maps)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the fault maps of all rates."""
        self._start(pl_module, self._models, self.maps)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Run the batch under every fault map."""
        self._run(trainer, pl_module, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Run the batch under every fault map."""
        self._run(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracy under the error model."""
        if self._meter is not None:
            log_merged(pl_module, {"val/acc_faulty": self._finish(trainer, [0.0]).mean[0]}, prog_bar=True)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the curve, and save it."""
        self.curve = self._finish(trainer, self.rates)
        axis = axis_name(self.axis)
        means = zip(self.curve.rates, self.curve.mean, strict=True)
        values = {f"test/acc_{axis}_{rate:g}".replace(".", "p"): mean for rate, mean in means}
        log_merged(pl_module, {**values, f"test/tolerable_{axis}": self.curve.tolerable_ber(self.drop)})
        if trainer.is_global_zero:
            log_curve(trainer, "test", self.curve)
            if self.save_dir is not None:
                save_curve(self.curve, self.save_dir)

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """Forget what was half measured."""
        self._meter = None

    def _start(self, pl_module: LightningModule, models: Sequence[ErrorModel], maps: int) -> None:
        options = (self.weights, self.target, self.activations)
        self._meter = AccuracyMeter(pl_module, models, maps, self.seed, *options)

    def _run(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        meter = self._meter
        if meter is None:
            return

        def correct() -> Tensor:
            # autocast keeps the cast of a weight for as long as it is entered: once for each fault map, then
            with trainer.precision_plugin.forward_context():
                return self.correct(pl_module, batch)

        with isolate_rng():
            meter.update(correct)

    def _finish(self, trainer: Trainer, rates: Sequence[float]) -> BERCurve:
        meter, self._meter = self._meter, None
        assert meter is not None
        for name in ("right", "clean_right", "total"):
            setattr(meter, name, trainer.strategy.reduce(getattr(meter, name), reduce_op="sum"))
        return meter.curve(rates, self.axis)


def save_curve(curve: BERCurve, folder: Path) -> None:
    """Write a curve as ``accuracy_over_ber.csv``, ``.png`` and ``.svg`` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    columns, rows = curve_table(curve)
    with (folder / "accuracy_over_ber.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    figure, _ = curve.plot()
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"accuracy_over_ber.{suffix}", dpi=150)
