"""Keep latent weights in a range."""

import math
from numbers import Real
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from bnnft.injection.finder import Finder
from bnnft.injection.sites import Site, Weights, checked_weights, known_sites


class LatentClamp(Callback):
    """Clamp latent weights to [-bound, bound] after every training batch.

    A latent weight that has run away no longer changes its bit: the clamp keeps it within reach of the optimizer.
    Layers that are not known are found by watching the first batch of each epoch.

    Args:
        bound: greater than 0.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.

    Raises:
        ValueError: ``bound`` is not positive and finite; at the start of training, a pattern matches nothing.

    Source: Courbariaux et al. 2015, BinaryConnect, section 2.4.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[LatentClamp()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, bound: float = 1.0, *, weights: Weights | None = None) -> None:
        number: Any = bound
        if isinstance(number, bool) or not isinstance(number, Real) or not 0 < float(number) < math.inf:
            raise ValueError(f"bound must be a number greater than 0, got {bound!r}")
        self.bound, self.weights = float(bound), checked_weights(weights)
        self._sites: list[Site] = []
        self._finder: Finder | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weights of known layers."""
        self._sites = known_sites(pl_module, self.weights)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch the first batch of an epoch for other layers."""
        self._close()
        if batch_idx == 0 and self.weights is None:
            self._finder = Finder(pl_module)
            self._finder.__enter__()

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Clamp in place; weights that hold the bits themselves have no latents."""
        finder = self._finder
        self._close()
        if finder is not None:
            self._sites = [site for site in finder.findings.sites() if site.where != "stored"]
        for site in self._sites:
            site.weight.clamp_(-self.bound, self.bound)

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """Stop watching."""
        self._close()

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Stop watching."""
        self._close()

    def _close(self) -> None:
        finder, self._finder = self._finder, None
        if finder is not None:
            finder.__exit__(None, None, None)
