"""Measure accuracy, or another score, under bit errors while Lightning evaluates."""

import re
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torchmetrics import Metric

from bnnft.ber import ErrorModel, as_error_model
from bnnft.compensation import Method
from bnnft.evaluation.compensated_maps import fault_maps
from bnnft.evaluation.curve import BERCurve, checked_drop
from bnnft.evaluation.maps import Flipping, checked_maps
from bnnft.evaluation.meter import ScoreMeter
from bnnft.evaluation.names import CurveNames
from bnnft.evaluation.points import curve_axis, error_models
from bnnft.evaluation.scores import Correct, Predict, SumAndCount, as_score
from bnnft.injection.activation import Target
from bnnft.injection.injection import How
from bnnft.injection.sites import Weights
from bnnft.loggers import announce, log_curve, log_merged, save_curve, say_once


class AccuracyOverBER(Callback):
    """Measure accuracy over BER at test, or another score: all rates and fault maps in one pass over the test data.

    Logs ``test/acc_ber_0p01`` and so on (mean over maps), ``test/tolerable_ber`` with
    ``test/tolerable_ber_is_lower_bound`` (1 where no tested rate is worse than ``drop`` allows), and to loggers that
    can show it the curve with its own x axis, as a table and as a figure. With an error model of its own it also logs
    ``val/acc_faulty`` at validation: the accuracy under this error model, as it is. Another score stands in these
    names in place of ``acc``. The last curve stays in :attr:`curve`. Data of several loaders count together. Values
    of samples: processes merge exactly.

    Args:
        rates: strictly ascending bit error rates in [0, 1]; values of another parameter from the fewest errors to the
            most (voltages from the highest down); the points of the error model if ``None``.
        maps: fault maps at each rate, >= 1. A fixed chip has one, which is run once however many are asked for.
        error_model: whose parameter ``axis`` takes the rates; independent flips if ``None``.
        axis: the parameter of the error model that ``rates`` sets, its own axis if ``None``; with ``axis="voltage"`` it
            logs ``test/acc_voltage_0p55`` and so on.
        seed: of the fault maps, >= 0; the same as ``seed`` of :func:`bnnft.flipped`.
        drop: that ``test/tolerable_ber`` allows, a fraction for accuracies; of a score whose lower values are better
            the rise that it allows.
        validation_maps: fault maps of ``val/acc_faulty``, >= 1.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.
        target: flip ``"weights"``, ``"activations"`` (anew in each batch) or ``"both"``.
        activations, how: see :func:`bnnft.flipped`.
        correct: ``correct(module, batch)`` returns a bool for each answer; without it batches are
            ``(inputs, targets)``, ``module(inputs)`` returns class scores of shape (N, C, ...) and targets are integers
            of shape (N, ...).
        score: another score: a torchmetrics metric, of which each map gets a clone, or ``score(module, batch)`` that
            returns a sum and a count, whose ratio is the score.
        predict: ``predict(module, batch)`` returns what the metric is updated with, a tuple ``(predictions, targets)``
            or a dict of keyword arguments; ``(module(inputs), targets)`` if ``None``.
        higher_is_better: of a score that is a function; without it there is no tolerable BER. A metric says it itself.
        name: stands before the names of all that is logged, ``test/NAME_acc_ber_0p01``; what tells several callbacks
            of this kind apart.
        save_dir: folder for the curve as ``accuracy_over_ber.csv``, ``.png`` and ``.svg``; none if ``None``.
        compensation: of the errors, see :class:`bnnft.compensation.Method`: a kind, several kinds, or a method.

    Raises:
        TypeError, ValueError: an argument is out of range; at the start, another callback logs under the same names,
            or the model has no such weights; at the first batch, its answers are not those that the score is taken of.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[AccuracyOverBER([0, 0.01, 0.1])], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        rates: Iterable[float] | None = None,
        maps: int = 5,
        *,
        error_model: float | ErrorModel | None = None,
        axis: str | None = None,
        seed: int = 0,
        drop: float = 0.01,
        validation_maps: int = 1,
        weights: Weights | None = None,
        target: Target = "weights",
        activations: Sequence[str] | None = None,
        how: How = "auto",
        correct: Correct | None = None,
        score: Metric | SumAndCount | None = None,
        predict: Predict | None = None,
        higher_is_better: bool | None = None,
        name: str | None = None,
        save_dir: str | None = None,
        compensation: str | Sequence[str] | Method | None = None,
    ) -> None:
        self.axis, self.rates = curve_axis(rates, error_model, axis)
        error_models(self.rates, error_model, self.axis)  # raises for rates that it can't have
        self.error_model = None if error_model is None else as_error_model(error_model)
        checked_maps(maps)
        checked_maps(validation_maps)
        self.maps, self.validation_maps = maps, validation_maps
        self._flipping = Flipping(seed, weights, target, activations, how, compensation)
        self._score = as_score(score, predict, correct, higher_is_better)
        checked_drop(drop, self._score.bounds)
        if name is not None and not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"name must be made of letters, digits, _ and -, got {name!r}")
        self.drop, self.name = drop, name or ""
        self.save_dir = None if save_dir is None else Path(save_dir)
        self.curve: BERCurve | None = None
        self._meter: ScoreMeter | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start afresh, and say what published figures the flips stand for.

        Raises:
            ValueError: another callback logs under the same names.
        """
        self._meter = None
        if stage in ("fit", "test"):
            self.curve = None
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        same = [callback for callback in callbacks if isinstance(callback, AccuracyOverBER)]
        for one, other in combinations(same, 2):
            if shared := one._log_names() & other._log_names():
                raise ValueError(f"two AccuracyOverBER would log {min(shared)!r}: give one of them a name=...")
        if self.error_model is not None:
            announce(trainer, self.error_model)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare for the fault maps of the error model itself; before training look at the answers alone."""
        if self.error_model is not None:
            self._start(pl_module, [] if trainer.sanity_checking else [self.error_model], self.validation_maps)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare for the fault maps of all rates."""
        self._start(pl_module, error_models(self.rates, self.error_model, self.axis), self.maps)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Run the batch under every fault map."""
        self._run(trainer, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Run the batch under every fault map."""
        self._run(trainer, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the score under the error model."""
        if trainer.sanity_checking:
            self._meter = None
        elif self._meter is not None:
            score = self._finish(trainer, [0.0]).mean[0]
            log_merged(pl_module, {f"val/{self._names.faulty}": score}, prog_bar=True)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the curve, and save it."""
        if self._meter is None:
            return
        self.curve = curve = self._finish(trainer, self.rates)
        values = dict(zip(curve.names.points(curve.rates), curve.mean, strict=True))
        if curve.higher_is_better is not None:
            values[curve.names.tolerable] = curve.tolerable_ber(self.drop)
            values[f"{curve.names.tolerable}_is_lower_bound"] = float(curve.is_lower_bound(self.drop))
        log_merged(pl_module, {f"test/{name}": value for name, value in values.items()})
        if trainer.is_global_zero:
            log_curve(trainer, "test", curve)
            if self.save_dir is not None:
                save_curve(curve, self.save_dir)

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """Forget what was half measured."""
        self._meter = None

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Let go of the module."""
        self._meter = None

    @property
    def _names(self) -> CurveNames:
        return CurveNames(self._score.name, self.axis, self.name)

    def _log_names(self) -> set[str]:
        """Return the names of all that is logged and written."""
        names = self._names
        logged = {*names.points(self.rates), names.over, names.tolerable, names.table, names.figure}
        own = {f"test/{name}" for name in logged}
        own |= {f"val/{names.faulty}"} if self.error_model is not None else set()
        return own | ({str(self.save_dir / names.file)} if self.save_dir is not None else set())

    def _start(self, pl_module: LightningModule, models: Sequence[ErrorModel], maps: int) -> None:
        self._meter = ScoreMeter(self._score, fault_maps(pl_module, models, maps, self._flipping))

    def _run(self, trainer: Trainer, batch: Any) -> None:
        if self._meter is not None:
            with isolate_rng():
                # autocast keeps the cast of a weight for as long as it is entered: once for each run, then
                self._meter.update(batch, trainer.precision_plugin.forward_context)

    def _finish(self, trainer: Trainer, rates: Sequence[float]) -> BERCurve:
        meter, self._meter = self._meter, None
        assert meter is not None
        meter.merge(lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum"))
        if meter.remark:
            say_once(trainer, f"AccuracyOverBER {self.name}", f"AccuracyOverBER: {meter.remark}", rank_zero_warn)
        return meter.curve(rates, self.axis, self.name)
