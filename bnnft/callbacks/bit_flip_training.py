"""Train under bit errors."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from bnnft.ber import ErrorModel, Key, as_error_model
from bnnft.callbacks.manual_steps import ManualSteps
from bnnft.callbacks.proof import find_faults, stored_signs
from bnnft.injection import Gradient, TurnedBits, checked_gradient, draw_flips
from bnnft.operands import OperandWatch
from bnnft.sharding import flattened_by
from bnnft.sites import Site, Weights, binarized_weights, known_sites, no_sites, sites_of, state_of, watched_sites

How = Literal["latent", "operand", "auto"]


class BitFlipTraining(Callback):
    """Turn stored bits before each training batch, and put them back before the optimizer's step.

    Forward and backward see the flipped weights, the optimizer updates the clean ones. Every batch has flips of its
    own; they depend on the seed and the number of the batch alone, so all processes of a distributed run draw the
    same, and a run that resumes from a checkpoint goes on with the same stream. Weights are bit for bit as the
    optimizer left them after any hook, error or interrupt, and checkpoints hold clean weights.

    Layers of :mod:`bnnft.nn`, brevitas and bitorch are known. All others are found by watching what the first batch
    computes with, which stays clean for them; the first batch with flips is watched once more and compared bit by bit
    with what was drawn.

    Args:
        error_model: a bit error rate in [0, 1] for independent flips, or an error model of :mod:`bnnft.ber`.
        gradient: of a flipped weight, ``"straight_through"`` or ``"exact"``, see :func:`bnnft.flipped`.
        seed: of the random bits, >= 0.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`; all that are found
            if ``None``.
        how: where the flips go: into the ``"latent"`` weight, whose sign is the bit in most layers, or into the
            ``"operand"`` of the linear map or convolution itself, which is exact for every binarizer but costs a
            little in each operation and runs compiled modules uncompiled; ``"auto"`` takes the operand where the
            latent proves inexact.
        biases: flip binary biases too.

    Raises:
        TypeError, ValueError: an argument is out of range; after the first batch, the model has no such weights.
        RuntimeError: a layer did not compute with the drawn flips, with how many bits were missed or turned unasked;
            the weights are sharded by FSDP1 or ZeRO-3; they are updated during backward and ``how="latent"``.

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
        weights: Weights | None = None,
        how: How = "latent",
        biases: bool = False,
    ) -> None:
        self.error_model = as_error_model(error_model)
        checked_gradient(gradient)
        Key(seed)  # raises if the seed is none
        if how not in get_args(How):
            raise ValueError(f"how must be one of {', '.join(get_args(How))}, got {how!r}")
        self.gradient, self.seed, self.weights, self.how, self.biases = gradient, seed, weights, how, biases
        self._sites: list[Site] = []
        self._resumed: list[dict[str, Any]] = []
        self._flips: dict[str, Tensor] = {}
        self._signs: dict[str, Tensor] = {}  # of clean weights, where the batch is watched
        self._watch: OperandWatch | None = None
        self._watches_left = 2
        self._draws = 0
        self._turned: TurnedBits | None = None
        self._turned_operands: TurnedBits | None = None
        self._steps: ManualSteps | None = None

    @property
    def state_key(self) -> str:
        """Identify this callback in a checkpoint, also beside another one of its kind."""
        weights = getattr(self.weights, "__qualname__", self.weights)  # of a function: the same in every process
        return self._generate_state_key(error_model=repr(self.error_model), seed=self.seed, weights=weights)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of draws so far, and where they go."""
        return {"draws": self._draws, "sites": [state_of(site) for site in self._sites]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the draws that were made before the checkpoint, and where they went."""
        self._draws, self._resumed = state_dict["draws"], state_dict["sites"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weights of known layers."""
        if flattened := flattened_by(trainer.strategy.model or pl_module):
            raise RuntimeError(
                f"BitFlipTraining can't work under {flattened}: it flattens weights of several layers into shards, "
                "where no bit has a place of its own, neither in the latent weight nor in an operand. "
                "DDP and FSDP2 (ModelParallelStrategy) work"
            )
        binarized_weights(pl_module, self.weights)  # raises for a pattern that matches nothing
        # a resumed run has flips in its first batch, as it would have had without the cut, and proves them once more
        resumed, self._resumed = sites_of(pl_module, self._resumed), []
        known = [] if self.how == "operand" else known_sites(pl_module, self.weights)
        if self.how == "auto":
            known = [site for site in known if not _stepped_in_backward(site)]
        self._sites, self._watches_left = resumed or known, 1 if resumed else 2
        _check_steps(self._sites)
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
            rank_zero_warn(
                "LBFGS evaluates a batch several times in one step; only the first evaluation sees flips, "
                "the others run on clean weights"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Turn the bits of this batch."""
        self._restore()
        self._flips = draw_flips(self._sites, self.error_model, Key(self.seed, self._draws, purpose="training"))
        self._draws += 1
        if self._watches_left:
            self._signs = stored_signs(self._sites)
            self._watch = OperandWatch(pl_module)
            self._watch.__enter__()
        if not pl_module.automatic_optimization:
            # the batch may go on after a step, with another optimizer, say: it sees the same flips then
            self._steps = ManualSteps(pl_module, self._turn_back, again=self._turn)
        in_operands = [site for site in self._sites if site.in_operand]
        self._turned_operands = TurnedBits(in_operands, self._flips, self.gradient, pl_module)
        self._turn()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the bits back: with automatic optimization there is one backward a batch, and it is done."""
        if pl_module.automatic_optimization:
            self._finish(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Put the bits back if there was no backward."""
        if pl_module.automatic_optimization:
            self._restore()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Put the bits back: with manual optimization, where a batch may go on after a step, or if none was made."""
        if pl_module.automatic_optimization:
            self._restore()
        else:
            self._finish(pl_module)

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

    def _turn(self) -> None:
        """Turn the bits that were drawn for this batch in latent weights, which no optimizer may see turned."""
        self._turned = TurnedBits([site for site in self._sites if not site.in_operand], self._flips, self.gradient)

    def _turn_back(self) -> None:
        if self._turned is not None:
            self._turned.restore()
            self._turned = None

    def _restore(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None
        watch, self._watch = self._watch, None
        operands, self._turned_operands = self._turned_operands, None
        try:
            self._turn_back()
        finally:
            if operands is not None:
                operands.restore()
            if watch is not None:
                watch.__exit__(None, None, None)

    def _finish(self, module: LightningModule) -> None:
        """Put the bits back, and learn from the batch if it was watched."""
        watch = self._watch
        faults = {} if watch is None else find_faults(self._sites, watch, self._signs, self._flips)
        self._restore()
        if watch is not None:
            self._learn(module, watch, faults)

    def _learn(self, module: LightningModule, watch: OperandWatch, faults: dict[str, str]) -> None:
        """Take sites from the first watched batch; after the second, all of them are proven."""
        if self._watches_left == 2:
            known = {site.name for site in self._sites}
            found = watched_sites(module, watch, self.weights, self.biases)
            if not found:
                raise no_sites(module)
            self._sites = [self._placed(site, faults) for site in found]
            self._report(watch)
            self._watches_left = 0 if known == {site.name for site in found} and not faults else 1
        else:
            self._watches_left = 0
            self._sites = [self._placed(site, faults) for site in self._sites]
        if faults and self.how == "latent":
            raise RuntimeError(
                f"these layers did not compute with the drawn flips ({'; '.join(faults.values())}): the sign of their "
                "latent weight is not the bit. BitFlipTraining(..., how='operand') turns the bits where they are used"
            )
        _check_steps(self._sites)

    def _placed(self, site: Site, faults: dict[str, str]) -> Site:
        """Decide where a site gets its flips; a latent that is not the bit counts as a fault."""
        if site.operand is None:
            return site
        unlike = self._watches_left == 2 and site.operand.how == "graph"
        if unlike and self.how == "latent":
            faults.setdefault(site.name, f"{site.name}: its operand has other signs")
        inexact = unlike or site.name in faults or _stepped_in_backward(site)
        return site._replace(in_operand=self.how == "operand" or (self.how == "auto" and (inexact or site.in_operand)))

    def _report(self, watch: OperandWatch) -> None:
        """Say once where the flips go, and what else is binary."""
        bits, names = sum(site.weight.numel() for site in self._sites), []
        for site in self._sites:
            how = "" if site.operand is None else f"found by {site.operand.how}"
            origin = "known" if site.known else "named" if self.weights is not None else how
            names.append(f"{site.name} ({origin}, {'operand' if site.in_operand else 'latent'})")
        rank_zero_info(f"BitFlipTraining: {self.error_model} on {bits:,} bits in {', '.join(names)}")
        biases = [name for name in watch.operands() if watch.parameters[name].dim() == 1]
        if biases and not self.biases and self.weights is None:
            rank_zero_info(f"BitFlipTraining leaves binary biases alone: {', '.join(biases)}; biases=True flips them")


def _stepped_in_backward(site: Site) -> bool:
    return bool(getattr(site.weight, "_post_accumulate_grad_hooks", None))


def _check_steps(sites: Sequence[Site]) -> None:
    """Raise RuntimeError for a weight that an optimizer may write to while its bits are turned."""
    stepped = [site.name for site in sites if not site.in_operand and _stepped_in_backward(site)]
    if stepped:
        raise RuntimeError(
            f"{', '.join(stepped)}: a hook that runs when the gradient is accumulated, as of an optimizer in backward, "
            "may write to this weight while its bits are turned. BitFlipTraining(..., how='operand') never turns them "
            "in the weight"
        )
