"""Measure accuracy, or another score, under bit errors while Lightning evaluates."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torchmetrics import Metric

from bnnft.ber import ErrorModel, as_error_model
from bnnft.compensation import Method
from bnnft.evaluation.compensated_maps import fault_maps
from bnnft.evaluation.curve import BERCurve, checked_drop
from bnnft.evaluation.maps import Flipping, checked_maps
from bnnft.evaluation.meter import ScoreMeter
from bnnft.evaluation.names import CurveNames, checked_name
from bnnft.evaluation.points import curve_axis, error_models
from bnnft.evaluation.scores import Correct, Predict, SumAndCount, as_score
from bnnft.injection.activation import Target
from bnnft.injection.places import How
from bnnft.injection.sites import Weights
from bnnft.loggers import announce, curve_numbers, log_curve, log_merged, save_curve, say_once


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
        axis: the parameter of the error model that ``rates`` sets, its own if ``None``; part of what is logged.
        seed: of the fault maps, >= 0; the same as ``seed`` of :func:`bnnft.flipped`.
        drop: that ``test/tolerable_ber`` allows, a fraction for accuracies; a rise where lower scores are better.
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
        name: before the names of all that is logged, ``test/NAME_acc_ber_0p01``: tells several of this kind apart.
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
        self.drop, self.name = drop, checked_name(name)
        self.save_dir = None if save_dir is None else Path(save_dir)
        self.curve: BERCurve | None = None
        self._measurement = _Measurement()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start afresh, and say what published figures the flips stand for.

        Raises:
            ValueError: another callback logs under the same names.
        """
        self._measurement = _Measurement()
        if stage in ("fit", "test"):
            self.curve = None
        _check_names(trainer)
        if self.error_model is not None:
            announce(trainer, self.error_model)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise ValueError for patterns that match nothing, before anything is trained."""
        fault_maps(pl_module, [], 1, self._flipping)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare for the fault maps of the error model itself; before training look at the answers alone."""
        if self.error_model is not None and not self._measurement.has_failed:
            self._start(pl_module, [] if trainer.sanity_checking else [self.error_model], self.validation_maps)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare for the fault maps of all rates."""
        self._start(pl_module, error_models(self.rates, self.error_model, self.axis), self.maps)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Run the batch under every fault map."""
        with self._measurement.sparing(trainer, f"val/{self.names.faulty}"):
            self._measurement.run(trainer, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Run the batch under every fault map."""
        self._measurement.run(trainer, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the score under the error model."""
        name = f"val/{self.names.faulty}"
        if self.error_model is not None and self._measurement.is_whole(trainer):
            with self._measurement.sparing(trainer, name):
                score = self._measurement.finish(trainer, [0.0], self).mean[0]
                log_merged(pl_module, {name: score}, prog_bar=True)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the curve, and save it."""
        if self._measurement.meter is None:
            return
        self.curve = curve = self._measurement.finish(trainer, self.rates, self)
        log_merged(pl_module, {f"test/{name}": value for name, value in curve_numbers(curve, self.drop).items()})
        if trainer.is_global_zero:
            if self.save_dir is not None:
                save_curve(curve, self.save_dir)  # before loggers are asked, which may fail
            log_curve(trainer, "test", curve)

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Let go of the module, and forget what was half measured."""
        self._measurement.meter = None

    on_exception = teardown

    @property
    def names(self) -> CurveNames:
        """How the curve and its parts are called in logs and files."""
        return CurveNames(self._score.name, self.axis, self.name)

    def _start(self, pl_module: LightningModule, models: Sequence[ErrorModel], maps: int) -> None:
        self._measurement.meter = ScoreMeter(self._score, fault_maps(pl_module, models, maps, self._flipping))


class _Measurement:
    """The meter of an evaluation, and what a trainer does with it.

    Attributes:
        meter: ``None`` where nothing is measured.
        has_failed: it could not be measured in this fit.
    """

    def __init__(self) -> None:
        self.meter: ScoreMeter | None = None
        self.has_failed = False

    def run(self, trainer: Trainer, batch: Any) -> None:
        """Run the batch under every fault map."""
        if self.meter is not None:
            with isolate_rng():
                # autocast keeps the cast of a weight for as long as it is entered: once for each run, then
                self.meter.update(batch, trainer.precision_plugin.forward_context)

    def finish(self, trainer: Trainer, rates: Sequence[float], callback: AccuracyOverBER) -> BERCurve:
        """Return the curve over the data of all processes."""
        meter, self.meter = self.meter, None
        assert meter is not None
        meter.merge(lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum"))
        if meter.remark:
            say_once(trainer, f"AccuracyOverBER {callback.name}", f"AccuracyOverBER: {meter.remark}", rank_zero_warn)
        return meter.curve(rates, callback.axis, callback.name)

    def is_whole(self, trainer: Trainer) -> bool:
        """Return whether an epoch of validation was measured on all processes, which must all ask."""
        if trainer.sanity_checking:
            self.meter = None
            return False
        failed = torch.tensor(float(self.has_failed), device=trainer.strategy.root_device)
        self.has_failed = bool(trainer.strategy.reduce(failed, reduce_op="sum"))
        return not self.has_failed

    @contextmanager
    def sparing(self, trainer: Trainer, name: str) -> Iterator[None]:
        """Let no error end a training that has begun: what can't be measured is left out for the rest of it."""
        try:
            yield
        except Exception as error:
            if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
                raise
            self.meter, self.has_failed = None, True
            warnings.warn(f"AccuracyOverBER leaves out {name} from now on: {error}", stacklevel=2)


def _check_names(trainer: Trainer) -> None:
    """Raise ValueError if two callbacks of a trainer log under the same names, or write the same files."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for one, other in combinations([each for each in callbacks if isinstance(each, AccuracyOverBER)], 2):
        if shared := _written(one) & _written(other):
            raise ValueError(f"two AccuracyOverBER would log {min(shared)!r}: give one of them a name=...")


def _written(callback: AccuracyOverBER) -> set[str]:
    """Return the names of all that a callback logs and writes."""
    names = callback.names
    written = {f"test/{name}" for name in names.all(callback.rates)}
    if callback.error_model is not None:
        written.add(f"val/{names.faulty}")
    if callback.save_dir is not None:
        written.add(str(callback.save_dir / names.file))
    return written
