"""Train under bit errors."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from bnnft.ber import ErrorModel, Key, Schedule, as_error_model, check_layers, checked_choice
from bnnft.callbacks.clean_pass import CleanPass
from bnnft.callbacks.manual_steps import ManualSteps
from bnnft.callbacks.placement import How, check_steps, placed, report, stepped_in_backward
from bnnft.callbacks.scheduled import ScheduledErrors
from bnnft.injection.activation import ActivationFlips, Target, checked_target, find_activations
from bnnft.injection.flipped import TurnedBits, draw_flips, is_none
from bnnft.injection.operand import Flips
from bnnft.injection.operands import OperandWatch
from bnnft.injection.proof import find_faults, stored_signs
from bnnft.injection.sites import (
    Site,
    Weights,
    binarized_weights,
    known_sites,
    no_sites,
    sites_of,
    state_of,
    watched_sites,
)
from bnnft.loggers import announce
from bnnft.tracing.sharding import flattened_by

Gradient = Literal["straight_through", "exact", "average"]


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
        gradient: of a flipped bit: ``"straight_through"``, at no cost, or ``"exact"``, at the cost of a copy of each
            weight's gradient, see :func:`bnnft.flipped`; or ``"average"``: of each batch a pass with flips
            (straight-through) and one without are averaged, as in RandBET, at twice the forwards and backwards. Batch
            norms and hooks of a backward see both passes; what the second one logs is dropped.
        seed: of the random bits, >= 0.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`; all that are found
            if ``None``.
        how: where the flips go: into the ``"latent"`` weight, whose sign is the bit in most layers, or into the
            ``"operand"`` of the linear map or convolution itself, which is exact for every binarizer but costs a
            little in each operation and runs compiled modules uncompiled; ``"auto"`` takes the operand where the
            latent proves inexact.
        biases: flip binary biases too.
        schedule: of the rate over training, of :mod:`bnnft.ber.schedule`; logs ``train/ber_factor``.
        target: flip ``"weights"``, ``"activations"``, the binary outputs of modules, or ``"both"``.
        activations: patterns of the names of modules that put out two values; all known ones (of bnnft.nn, brevitas and
            bitorch) if ``None``.

    Raises:
        TypeError, ValueError: an argument is out of range; after the first batch, the model has no such weights.
        RuntimeError: a layer did not compute with the drawn flips, with how many bits were missed or turned unasked;
            the weights are sharded by FSDP1 or ZeRO-3; they are updated during backward and ``how="latent"``.

    Source: Hirtzlin et al. 2019, arXiv 1904.03652; Buschjaeger et al. 2020, arXiv 2002.00909; the average of two
    passes: Stutz et al. 2021, arXiv 2006.13977.

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
        schedule: Schedule | None = None,
        target: Target = "weights",
        activations: Sequence[str] | None = None,
    ) -> None:
        self.error_model = as_error_model(error_model)
        Key(seed)  # raises if the seed is none
        checked_choice(gradient, Gradient, "gradient")
        checked_choice(how, How, "how")
        checked_target(target)
        self.gradient, self.seed, self.weights, self.how, self.biases = gradient, seed, weights, how, biases
        self.target, self.activations = target, activations
        self._errors = ScheduledErrors(self.error_model, schedule, seed)
        self._sites: list[Site] = []
        self._neurons: list[str] = []  # names of the modules whose binary outputs are flipped
        self._resumed: list[dict[str, Any]] = []
        self._flips: dict[str, Flips] = {}
        self._signs: dict[str, Tensor] = {}  # of clean weights, where the batch is watched
        self._watch: OperandWatch | None = None
        self._watches_left = 2
        self._draws = 0
        self._turned: TurnedBits | None = None
        self._in_forward = ExitStack()  # flips of operands and of activations
        self._steps: ManualSteps | None = None
        self._clean_pass: CleanPass | None = None

    @property
    def state_key(self) -> str:
        """Identify this callback in a checkpoint, also beside another one of its kind."""
        weights = getattr(self.weights, "__qualname__", self.weights)  # of a function: the same in every process
        parts = {"error_model": repr(self.error_model), "seed": self.seed, "weights": weights, "target": self.target}
        return self._generate_state_key(**parts)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of draws so far, where they go, and when a curriculum began."""
        sites = [state_of(site) for site in self._sites]
        return {"draws": self._draws, "sites": sites, "start": self._errors.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the draws that were made before the checkpoint, and where they went."""
        self._draws, self._resumed, self._errors.start = (state_dict[name] for name in ("draws", "sites", "start"))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say what published figures the flips stand for."""
        if stage == "fit":
            announce(trainer, self.error_model)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weights of known layers, and the activations."""
        if self.gradient == "average" and not pl_module.automatic_optimization:
            raise RuntimeError("gradient='average' runs each batch twice, which manual optimization has to do itself")
        self._neurons = [] if self.target == "weights" else find_activations(pl_module, self.activations)
        if self.target == "activations":
            check_layers(self.error_model, self._neurons)
            self._watches_left = 0
        else:
            self._find_weights(trainer, pl_module)

    def _find_weights(self, trainer: Trainer, pl_module: LightningModule) -> None:
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
            known = [site for site in known if not stepped_in_backward(site)]
        self._sites, self._watches_left = resumed or known, 1 if resumed else 2
        check_steps(self._sites)
        if resumed:
            self._check_layers()
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
            rank_zero_warn(
                "LBFGS evaluates a batch several times in one step; only the first evaluation sees flips, "
                "the others run on clean weights"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Turn the bits of this batch."""
        self._restore()
        key, error_model = Key(self.seed, self._draws, purpose="training"), self._errors.at(self._draws)
        self._flips = draw_flips(self._sites, error_model, key)
        if self._errors.schedule is not None:
            pl_module.log("train/ber_factor", self._errors.factor(self._draws))
        self._draws += 1
        clean = not self._neurons and all(map(is_none, self._flips.values()))
        if self.gradient == "average" and not clean:
            self._clean_pass = CleanPass(batch, batch_idx)
        if self._watches_left == 2 or (self._watches_left == 1 and not clean):
            self._signs = stored_signs(self._sites)
            self._watch = OperandWatch(pl_module)
            self._watch.__enter__()
        if not pl_module.automatic_optimization:
            # the batch may go on after a step, with another optimizer, say: it sees the same flips then
            self._steps = ManualSteps(pl_module, self._turn_back, again=self._turn)
        in_operands = [site for site in self._sites if site.in_operand]
        self._in_forward.callback(TurnedBits(in_operands, self._flips, self._through, pl_module).restore)
        exact = self.gradient == "exact"
        self._in_forward.enter_context(ActivationFlips(pl_module, self._neurons, error_model, key, exact))
        self._turn()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Halve the gradient where two passes are averaged."""
        if self._clean_pass is not None:
            self._clean_pass.halve(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the bits back: with automatic optimization there is one backward a batch, and it is done."""
        clean_pass = self._clean_pass
        if not pl_module.automatic_optimization or (clean_pass is not None and clean_pass.running):
            return
        self._finish(pl_module)
        if clean_pass is not None:
            self._clean_pass = clean_pass
            clean_pass.run(trainer, pl_module)
            self._clean_pass = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Put the bits back if there was no backward."""
        if pl_module.automatic_optimization:
            self._restore()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Put the bits back: with manual optimization, where a batch may go on after a step, or if none was made."""
        if pl_module.automatic_optimization:
            self._restore()
        else:
            self._finish(pl_module)
        self._errors.learn(trainer, outputs, self._draws)

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

    @property
    def _through(self) -> Literal["straight_through", "exact"]:
        """The gradient through the flips of the first pass."""
        return "exact" if self.gradient == "exact" else "straight_through"

    def _turn(self) -> None:
        """Turn the bits that were drawn for this batch in latent weights, which no optimizer may see turned."""
        latent = [site for site in self._sites if not site.in_operand]
        self._turned = TurnedBits(latent, self._flips, self._through)

    def _turn_back(self) -> None:
        if self._turned is not None:
            self._turned.restore()
            self._turned = None

    def _restore(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None
        watch, self._watch, self._clean_pass = self._watch, None, None
        try:
            self._turn_back()
        finally:
            self._in_forward.close()
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
            self._sites = [placed(site, faults, self.how, first=True) for site in found]
            report(self.error_model, self._sites, watch, self.weights, self.biases)
            self._check_layers()
            flips = any(not is_none(indices) for indices in self._flips.values())  # else nothing is proven yet
            self._watches_left = 0 if known == {site.name for site in found} and flips and not faults else 1
        else:
            self._watches_left = 0
            self._sites = [placed(site, faults, self.how, first=False) for site in self._sites]
        if faults and self.how == "latent":
            raise RuntimeError(
                f"these layers did not compute with the drawn flips ({'; '.join(faults.values())}): the sign of their "
                "latent weight is not the bit. BitFlipTraining(..., how='operand') turns the bits where they are used"
            )
        check_steps(self._sites)

    def _check_layers(self) -> None:
        check_layers(self.error_model, [*(site.name for site in self._sites), *self._neurons])
