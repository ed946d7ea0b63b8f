"""A second pass over the batch, without flips, whose gradient is averaged with the first one's."""

import inspect
from typing import Any

from lightning import LightningModule, Trainer
from torch import Tensor

from bnnft.loggers import unlogged
from bnnft.tracing.state import unchanged


class CleanPass:
    """Forward and backward of one batch once more, as Lightning ran them; what the step logs is dropped.

    Args:
        batch: that is trained on.
        batch_idx: its number.
    """

    def __init__(self, batch: Any, batch_idx: int) -> None:
        self._batch, self._batch_idx, self.running = batch, batch_idx, False

    @staticmethod
    def halve(loss: Tensor) -> None:
        """Let a loss have half its gradient, as each of both passes has."""
        loss.register_hook(lambda gradient: gradient / 2)  # type: ignore[no-untyped-call]

    def run(self, trainer: Trainer, module: LightningModule) -> None:
        """Add the gradient of the clean pass to that of the first one."""
        self.running = True
        several = len(inspect.signature(module.training_step).parameters) > 1
        # statistics are of all that the network is trained on; what the step keeps is of the batch, which is one
        norms = [part for part in module.modules() if hasattr(part, "running_mean")]
        with unlogged(trainer, module), unchanged(module, skip=norms):
            result: Any = trainer.strategy.training_step(self._batch, *[self._batch_idx][:several])
            loss = result["loss"] if isinstance(result, dict) else result
            # with the hooks of a backward pass, which halve it
            trainer.strategy.backward(loss / trainer.accumulate_grad_batches, trainer.optimizers[0])
