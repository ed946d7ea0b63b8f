"""Predict accuracy over BER at test, beside what is measured."""

from collections.abc import Iterable, Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from bnnft.ber import ErrorModel
from bnnft.compensation import Method, as_method
from bnnft.evaluation.curve import BERCurve
from bnnft.evaluation.points import curve_axis, error_models
from bnnft.evaluation.prediction import PredictionMeter
from bnnft.injection.sites import Weights
from bnnft.loggers import log_curve, log_merged, say_once


class PredictedAccuracyOverBER(Callback):
    """Predict a classifier's accuracy over BER at test, in closed form and without a fault map.

    Logs ``test/predicted_acc_ber_0p01`` and so on, and the curve, as :class:`bnnft.callbacks.AccuracyOverBER` does for
    measured ones. Where a network has no closed form, convolutions, say, that is said once and nothing is logged.
    Values of samples: processes merge exactly.

    Args:
        rates: of the errors, see :func:`bnnft.predict_accuracy_over_ber`.
        error_model: that says its rates; independent flips if ``None``.
        axis: of the error model that ``rates`` sets, its own if ``None``.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.
        compensation: of the errors, see :class:`bnnft.compensation.Method`.

    Attributes:
        curve: the last one; ``None`` where none could be predicted.

    Raises:
        TypeError, ValueError: an argument is out of range.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[PredictedAccuracyOverBER([0, 0.1])], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        rates: Iterable[float] | None = None,
        *,
        error_model: float | ErrorModel | None = None,
        axis: str | None = None,
        weights: Weights | None = None,
        compensation: str | Sequence[str] | Method | None = None,
    ) -> None:
        self.axis, self.rates = curve_axis(rates, error_model, axis)
        self._models = error_models(self.rates, error_model, self.axis)
        self._weights = weights
        self._compensation = as_method(compensation) if compensation else None
        self.curve: BERCurve | None = None
        self._meter: PredictionMeter | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start afresh."""
        self.curve = self._meter = None
        with _Said(trainer) as said:
            self._meter = PredictionMeter(pl_module, self._models, self._weights, self._compensation)
        self._failed = said.failed

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Predict the answers of the batch."""
        if self._meter is not None and not self._failed:
            with _Said(trainer) as said:
                self._meter.update(batch)
            self._failed = said.failed

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the curve."""
        meter, self._meter = self._meter, None
        failed = trainer.strategy.reduce_boolean_decision(self._failed or meter is None, all=False)
        if failed or meter is None:
            return
        meter.merge(lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum"))
        self.curve = curve = meter.curve(self.rates, self.axis, "predicted")
        values = zip(curve.names.points(curve.rates), curve.mean, strict=True)
        log_merged(pl_module, {f"test/{name}": value for name, value in values})
        if trainer.is_global_zero:
            log_curve(trainer, "test", curve)

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Let go of the module."""
        self._meter = None


class _Said:
    """Says an error once and goes on: a measurement ends no run."""

    failed = False

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __enter__(self) -> "_Said":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> bool:
        self.failed = isinstance(error, Exception)
        if self.failed:
            text = f"PredictedAccuracyOverBER leaves the prediction out: {error}"
            say_once(self._trainer, "PredictedAccuracyOverBER", text, rank_zero_warn)
        return self.failed
