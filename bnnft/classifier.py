"""The LightningModule that trains a classifier; it knows nothing of faults."""

import math
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy


class Classifier(LightningModule):
    """Trains a network to classify: loss, optimizer and scheduler as arguments; logs loss and accuracy.

    Logs ``train/loss`` each step (as the trainer's ``log_every_n_steps`` says), ``val/loss``, ``val/acc``,
    ``test/loss`` and ``test/acc``.

    Args:
        model: maps a batch of inputs to class scores, shape (N, num_classes).
        num_classes: number of classes, >= 2.
        loss: of scores and targets, mean over the batch.
        optimizer: called with the parameters; Adam at 1e-3 if ``None``.
        scheduler: called with the optimizer and the number of steps of the run, advanced after each step; a constant
            rate if ``None``.

    Example:
        >>> from bnnft.model import FC
        >>> module = Classifier(FC((1, 8, 8), 10, widths=[32]), num_classes=10)
        >>> module(torch.ones(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        loss: nn.Module | None = None,
        optimizer: Callable[[Any], Optimizer] | None = None,
        scheduler: Callable[[Optimizer, int], Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        self._optimizer = torch.optim.Adam if optimizer is None else optimizer
        self._scheduler = scheduler
        self.val_accuracy: Metric = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy: Metric = self.val_accuracy.clone()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return class scores."""
        scores: Tensor = self.model(inputs)
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> Tensor:
        """Return the loss of the batch."""
        inputs, targets = batch
        loss: Tensor = self.loss(self(inputs), targets)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> None:
        """Log loss and accuracy of the epoch."""
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> None:
        """Log loss and accuracy of the epoch."""
        self._evaluate(batch, "test", self.test_accuracy)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> Tensor:
        """Return the predicted classes."""
        return self.forward(batch[0]).argmax(1)

    def configure_optimizers(self) -> Any:
        """Build optimizer and scheduler."""
        optimizer = self._optimizer(self.parameters())
        if self._scheduler is None:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if steps in (-1, math.inf):
            raise ValueError(
                "scheduler needs the number of steps of the run, which nobody knows: the loader has no length, or "
                "training has no end; set max_steps of the trainer, or leave the scheduler out"
            )
        scheduler = self._scheduler(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: Metric) -> None:
        inputs, targets = batch
        scores = self(inputs)
        accuracy(scores, targets)
        self.log(f"{stage}/loss", self.loss(scores, targets))
        self.log(f"{stage}/acc", accuracy, prog_bar=True)


def sample_losses(module: Classifier, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the classifier's loss of each sample, shape (N,): what exact estimates of importance need.

    Example:
        >>> from bnnft.model import FC
        >>> module = Classifier(FC((4,), 2, widths=[8]), num_classes=2).eval()
        >>> sample_losses(module, (torch.ones(3, 4), torch.tensor([0, 1, 0]))).shape
        torch.Size([3])
    """
    inputs, targets = batch
    scores = module(inputs)
    if hasattr(module.loss, "reduction"):
        loss: Any = copy(module.loss)
        loss.reduction = "none"
        losses: Tensor = loss(scores, targets)
        return losses
    return torch.stack([module.loss(scores[i : i + 1], targets[i : i + 1]) for i in range(len(targets))])
