"""Train under bit errors."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from bnnft.ber import ErrorModel, Key, as_error_model
from bnnft.injection import Gradient, TurnedBits, checked_gradient, draw_flips
from bnnft.sites import Site, find_sites


class BitFlipTraining(Callback):
    """Turn stored bits before each training batch, and put them back before the optimizer's step.

    Forward and backward see the flipped weights, the optimizer updates the clean ones. Every batch has flips of its
    own; they depend on the seed and the number of the batch alone, so all processes of a distributed run draw the
    same, and a run that resumes from a checkpoint goes on with the same stream. Weights are bit for bit as the
    optimizer left them after any hook, error or interrupt, and checkpoints hold clean weights.

    Args:
        error_model: a bit error rate in [0, 1] for independent flips, or an error model of :mod:`bnnft.ber`.
        gradient: of a flipped weight, ``"straight_through"`` or ``"exact"``, see :func:`bnnft.flipped`.
        seed: of the random bits, >= 0.
        weights: patterns that select weights, see :func:`bnnft.binarized_weights`.

    Raises:
        TypeError, ValueError: an argument is out of range; at the start of training, the model has no such weights.

    Source: Hirtzlin et al. 2019, arXiv 1904.03652; Buschjaeger et al. 2020, arXiv 2002.00909.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[BitFlipTraining(0.1)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        error_model: float | ErrorModel,
        *,
        gradient: Gradient = "straight_through",
        seed: int = 0,
        weights: Sequence[str] | None = None,
    ) -> None:
        self.error_model = as_error_model(error_model)
        checked_gradient(gradient)
        Key(seed)  # raises if the seed is none
        self.gradient, self.seed, self.weights = gradient, seed, weights
        self._sites: list[Site] = []
        self._draws = 0
        self._turned: TurnedBits | None = None

    @property
    def state_key(self) -> str:
        """Identify this callback in a checkpoint, also beside another one of its kind."""
        return self._generate_state_key(error_model=repr(self.error_model), seed=self.seed, weights=self.weights)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of draws so far."""
        return {"draws": self._draws}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the draws that were made before the checkpoint."""
        self._draws = state_dict["draws"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weights and say once which they are."""
        self._sites = find_sites(pl_module, self.weights)
        bits = sum(site.weight.numel() for site in self._sites)
        names = ", ".join(site.name for site in self._sites)
        rank_zero_info(f"BitFlipTraining: {self.error_model} on {bits:,} bits in {names}")
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
            rank_zero_warn(
                "LBFGS evaluates a batch several times in one step; only the first evaluation sees flips, "
                "the others run on clean weights"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Turn the bits of this batch."""
        self._restore()
        flips = draw_flips(self._sites, self.error_model, Key(self.seed, self._draws, purpose="training"))
        self._draws += 1
        self._turned = TurnedBits(self._sites, flips, self.gradient)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the bits back: with automatic optimization there is one backward a batch, and it is done."""
        if pl_module.automatic_optimization:
            self._restore()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Put the bits back before any update: with manual optimization, or when there was no backward."""
        self._restore()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Put the bits back if no step was made."""
        self._restore()

    def on_train_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Put the bits back if the batch was skipped after its start."""
        self._restore()

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """Put the bits back."""
        self._restore()

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Put the bits back."""
        self._restore()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep flips out of a checkpoint that somebody saves in the middle of a batch."""
        if self._turned is not None:
            checkpoint["state_dict"] = self._turned.clean(pl_module, checkpoint["state_dict"])

    def _restore(self) -> None:
        if self._turned is not None:
            self._turned.restore()
            self._turned = None
