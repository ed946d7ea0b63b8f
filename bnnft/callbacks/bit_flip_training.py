"""Train under bit errors."""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from bnnft.ber import ErrorModel, Schedule, as_error_model, checked_choice
from bnnft.evaluation.maps import Flipping
from bnnft.injection.activation import Target
from bnnft.injection.gathered import take_down
from bnnft.injection.places import How
from bnnft.injection.scheduled import ScheduledErrors
from bnnft.injection.sites import Weights
from bnnft.injection.training import Batch, BitFlips
from bnnft.loggers import announce, unlogged
from bnnft.tracing.sharding import flattened_by
from bnnft.tracing.state import unchanged

Gradient = Literal["straight_through", "exact", "average"]


class BitFlipTraining(Callback):
    """Flip stored bits in each training batch.

    Forward and backward see the flipped bits, the optimizer updates the clean latent weights. Every batch has flips of
    its own; they depend on the seed and the number of the batch alone, so all processes of a distributed run draw the
    same, and a run that resumes from a checkpoint goes on with the same stream. Checkpoints hold clean weights.

    Layers of :mod:`bnnft.nn`, brevitas and bitorch are known. All others are found by watching what the first batch in
    which they run computes with, which stays clean for them. Until 100 flips of a weight were seen, and again where the
    rate has grown fourfold, batches are watched and compared bit by bit with what was drawn.

    Args:
        error_model: a bit error rate in [0, 1] for independent flips, or an error model of :mod:`bnnft.ber`.
        gradient: of a flipped bit: ``"straight_through"``, at no cost, or ``"exact"``, see :func:`bnnft.flipped`; or
            ``"average"``: of each batch a pass with flips (straight-through) and one without are averaged, as in
            RandBET, at twice the forwards and backwards. Batch norms and hooks of a backward see both passes; nothing
            else of the second one stays but its gradient: no counters, no lists, no logs.
        seed: of the random bits, >= 0.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.
        how: where bits are flipped, see :func:`bnnft.flipped`.
        biases: flip binary biases too.
        schedule: of the rate, of :mod:`bnnft.ber.schedule`; logs ``train/ber_factor``.
        target: flip ``"weights"``, ``"activations"``, the binary outputs of modules, or ``"both"``.
        activations: patterns of the names of modules that put out two values; all known ones if ``None``.

    Attributes:
        training: the flips of the run: what is found, drawn and proven.

    Raises:
        TypeError, ValueError: an argument is out of range; after the first batch, the model has no such weights.
        RuntimeError: a layer did not compute with the drawn flips; the weights are sharded by FSDP1 or ZeRO-3.

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
        how: How = "auto",
        biases: bool = False,
        schedule: Schedule | None = None,
        target: Target = "weights",
        activations: Sequence[str] | None = None,
    ) -> None:
        self.error_model = as_error_model(error_model)
        checked_choice(gradient, Gradient, "gradient")
        ScheduledErrors(self.error_model, schedule, seed)  # raises if the error model has no rate to move
        self.gradient = gradient
        flipping = vars(Flipping(seed, weights, target, activations, how))  # raises for what is out of range
        own = {"biases": biases, "schedule": schedule, "gradient": gradient.replace("average", "straight_through")}
        self._options: dict[str, Any] = own | {n: each for n, each in flipping.items() if n != "compensation"}
        self.training: BitFlips | None = None
        self._batch: Batch | None = None
        self._second: tuple[Any, int] | None = None  # the batch, where a pass without flips follows each with flips
        self._in_second = False
        self._state: dict[str, Any] = {}
        self._trainer: Trainer | None = None

    @property
    def state_key(self) -> str:
        """Identify this callback in a checkpoint, also beside another one of its kind."""
        options = ((name, self._options[name]) for name in ("seed", "weights", "target"))
        parts = {name: getattr(each, "__qualname__", each) for name, each in options}  # the same in every process
        return self._generate_state_key(error_model=repr(self.error_model), **parts)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of batches that are done, where their flips go, and when a curriculum began."""
        if self.training is None:
            return self._state
        done = self.training.batches if self._batch is None else self._batch.number + _is_processed(self._trainer)
        return self.training.state_dict() | {"draws": done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the batches that were done before the checkpoint."""
        self._state = dict(state_dict)
        if self._trainer is not None:  # a test of the checkpoint too
            take_down(self._trainer.lightning_module, self._state.get("gathered_at", {}))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start afresh, and say what published figures the flips stand for."""
        self._trainer = trainer
        if stage == "fit":
            self.training, self._state = None, {}
            announce(trainer, self.error_model)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weights of known layers, and the activations."""
        _check_trainer(trainer, pl_module, self.gradient)
        self.training = BitFlips(pl_module, self.error_model, **self._options, say=rank_zero_info, warn=rank_zero_warn)
        if self._state:
            self.training.load_state_dict(self._state)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look once in each epoch for weights that are not known yet."""
        if self.training is not None:
            self.training.look_again()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Flip the bits of this batch."""
        self._cancel()
        assert self.training is not None
        self._batch = Batch(self.training)
        self._batch.begin()
        if (errors := self.training.errors).schedule is not None:
            pl_module.log("train/ber_factor", errors.factor(self._batch.number))
        self._second = (batch, batch_idx) if self.gradient == "average" and self._batch.has_flips else None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Halve the gradient where two passes are averaged."""
        if self._second is not None:
            loss.register_hook(lambda gradient: gradient / 2)  # type: ignore[no-untyped-call]

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the pass without flips, where two are averaged."""
        if self._second is None or self._batch is None or self._in_second:
            return
        self._batch.cancel()
        self._in_second = True
        _run_clean(trainer, pl_module, *self._second)
        self._in_second = False
        self._batch.resume()  # for optimizers that evaluate a batch several times

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Restore, and learn from the batch."""
        if self._batch is not None and self.training is not None:
            self._batch.finish()
            self._batch = self._second = None
            _learn_loss(trainer, self.training, outputs)

    def _cancel(self, *args: Any, **kwargs: Any) -> None:
        """Restore."""
        if self._batch is not None:
            self._batch.cancel()
        self._batch, self._second, self._in_second = None, None, False

    on_exception = teardown = _cancel
    on_train_epoch_end = _cancel  # a batch may be skipped after its start


def _check_trainer(trainer: Trainer, pl_module: LightningModule, gradient: Gradient) -> None:
    """Raise RuntimeError where bits can't be flipped, or the gradient can't be averaged."""
    if gradient == "average" and not pl_module.automatic_optimization:
        raise RuntimeError("gradient='average' runs each batch twice, which manual optimization has to do itself")
    if flattened := flattened_by(trainer.strategy.model or pl_module):
        raise RuntimeError(
            f"BitFlipTraining can't work under {flattened}: it flattens weights of several layers into shards, "
            "where no bit has a place of its own. DDP and FSDP2 (ModelParallelStrategy) work"
        )


def _is_processed(trainer: Trainer | None) -> bool:
    """Return whether Lightning counts the running batch as done: a run that resumes goes on after it."""
    assert trainer is not None
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(progress.processed == progress.ready)


def _run_clean(trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
    """Run forward and backward of a batch once more; nothing of it stays but the gradient, and batch norms."""
    several = len(inspect.signature(pl_module.training_step).parameters) > 1
    # statistics are of all that the network is trained on; what the step keeps is of the batch, which is one
    norms = [part for part in pl_module.modules() if hasattr(part, "running_mean")]
    with unlogged(trainer, pl_module), unchanged(pl_module, skip=norms):
        result: Any = trainer.strategy.training_step(*([batch, batch_idx] if several else [batch]))
        loss = result["loss"] if isinstance(result, dict) else result
        # with the hooks of a backward pass, which halve it
        trainer.strategy.backward(loss / trainer.accumulate_grad_batches, trainer.optimizers[0])


def _learn_loss(trainer: Trainer, training: BitFlips, outputs: Any) -> None:
    """Tell a curriculum the loss of a batch, the mean over all processes."""
    if not training.errors.waits:
        return
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if not isinstance(loss, Tensor):
        if outputs:
            raise ValueError(f"Curriculum needs training_step to return the loss, got {type(outputs).__name__}")
        return
    mean: Any = trainer.strategy.reduce(loss.detach(), reduce_op="mean")
    # Lightning hands it over divided, with automatic optimization (with manual one this is 1)
    training.errors.learn(float(mean) * trainer.accumulate_grad_batches, training.batches)
