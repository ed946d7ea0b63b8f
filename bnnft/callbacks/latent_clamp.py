"""Keep latent weights in a range."""

import math
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from bnnft.injection.sites import Site, Weights, find_sites


class LatentClamp(Callback):
    """Clamp latent weights to [-bound, bound] after every training batch.

    A latent weight that has run away no longer changes its bit: the clamp keeps it within reach of the optimizer.

    Args:
        bound: greater than 0.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.

    Raises:
        ValueError: ``bound`` is not positive and finite; at the start of training, the model has no such weights.

    Source: Courbariaux et al. 2015, BinaryConnect, section 2.4.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[LatentClamp()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, bound: float = 1.0, *, weights: Weights | None = None) -> None:
        if not (bound > 0 and math.isfinite(bound)):
            raise ValueError(f"bound must be a number greater than 0, got {bound!r}")
        self.bound, self.weights = bound, weights
        self._sites: list[Site] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weights."""
        self._sites = find_sites(pl_module, self.weights)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Clamp in place."""
        for site in self._sites:
            site.weight.clamp_(-self.bound, self.bound)
