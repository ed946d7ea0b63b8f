"""Show the progress of training, and what was measured."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class ProgressBar(RichProgressBar):
    """Lightning's progress bar without the version number of a logger.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[ProgressBar()], logger=False, enable_checkpointing=False)
    """

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return what the bar shows beside itself."""
        shown: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        shown.pop("v_num", None)
        return shown
