"""Test and predict with the errors of a memory compensated."""

from collections.abc import Iterable, Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer

from bnnft.ber import ErrorModel, as_error_model
from bnnft.compensation.compensated import checked_here, running
from bnnft.compensation.compensator import Compensator
from bnnft.compensation.method import Method, as_method
from bnnft.injection.sites import Weights
from bnnft.tracing.one_call import OneCall


class Compensation(Callback):
    """Compensate the errors of a memory in the test and predict steps of a module that runs in it.

    It flips nothing: the module runs under the errors of its memory, or of :func:`bnnft.flipped`. Nothing is written to
    the module; at which errors its statistics were gathered is taken from the checkpoint, where
    :class:`bnnft.callbacks.BitFlipTraining` is among the callbacks. For curves see ``compensation`` of
    :class:`bnnft.callbacks.AccuracyOverBER`.

    Args:
        error_model: a bit error rate in [0, 1], or an error model of :mod:`bnnft.ber` that says its rates.
        kind: see :func:`bnnft.compensated`.
        data: for recalibration, see there; it runs in the first step.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.

    Raises:
        TypeError, ValueError: an argument is out of range; in the first step, as :func:`bnnft.compensated`.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[Compensation(0.1)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        error_model: float | ErrorModel,
        kind: str | Sequence[str] | Method = "auto",
        *,
        data: Iterable[Any] | None = None,
        weights: Weights | None = None,
    ) -> None:
        self.error_model, self.method = as_error_model(error_model), checked_here(as_method(kind), data)
        self._data, self._weights = data, weights
        self._compensator: Compensator | None = None
        self._call: OneCall | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look anew what can be corrected."""
        self._compensator = Compensator(pl_module, self.method, self._weights, self._data is not None)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look anew what can be corrected."""
        self.on_test_start(trainer, pl_module)

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Compensate the step, and nothing else that runs for the batch."""
        self._around(pl_module, "test_step")

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Compensate the step, and nothing else that runs for the batch."""
        self._around(pl_module, "predict_step")

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """Leave the step alone."""
        self._leave()

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Let go of the module."""
        self._leave()
        self._compensator = None

    def _around(self, pl_module: LightningModule, step: str) -> None:
        compensator = self._compensator
        assert compensator is not None
        self._leave()
        self._call = OneCall(pl_module, step, lambda: running(compensator, self.error_model, self._data))

    def _leave(self) -> None:
        if self._call is not None:
            self._call.remove()
        self._call = None
