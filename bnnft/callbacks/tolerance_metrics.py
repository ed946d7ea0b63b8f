"""Measure margins and importance of neurons while Lightning evaluates."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric

from bnnft.injection.sites import Weights, checked_weights
from bnnft.loggers import log_histograms, log_merged, log_neurons, short_names, unlogged
from bnnft.metrics import ClassMargin, Histogram, ImportanceVariance, Margin
from bnnft.metrics.found import checked_chains, named_blocks
from bnnft.metrics.layers import checked_metrics
from bnnft.metrics.meter import Meter
from bnnft.tracing.one_call import OneCall


class ToleranceMetrics(Callback):
    """Log what predicts bit error tolerance, at validation and test, on clean weights in eval mode.

    Each metric is measured for each layer that offers what its ``update`` asks for and is logged as
    ``val/margin/<layer>`` and so on. Batch norms and neurons are found by following tensors. Outputs, gradients,
    random streams and what the module keeps stay as they are. What can't be measured is left out, with a warning.

    Args:
        metrics: metrics of :mod:`bnnft.metrics` or your own, of different classes; ``Margin``, ``ImportanceVariance``
            and ``ClassMargin`` if ``None``.
        loss: ``loss(module, batch)`` for the importance, one value a sample or the batch's mean; without it the
            loss is what the module's ``training_step`` returns.
        importance: measure importance, for which the loss of each batch is computed once more.
        importance_batches: on so many batches only; on all if ``None``.
        chains: for layers whose neuron outputs are not found, or wrongly: ``{layer: [norm, activation]}`` by
            qualified module names, ``norm`` may be ``None``.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.
        name: put before the names of metrics, ``val/<name>_margin/<layer>``, so that several callbacks log apart.

    Raises:
        ValueError: an argument is out of range; at the start, ``chains`` or ``weights`` match nothing, or another
            callback logs under the same names.

    Source: arXiv 2102.01344.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[ToleranceMetrics()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        metrics: Sequence[Metric] | None = None,
        *,
        loss: Callable[[LightningModule, Any], Tensor] | None = None,
        importance: bool = True,
        importance_batches: int | None = None,
        chains: Mapping[str, Sequence[str | None]] | None = None,
        weights: Weights | None = None,
        name: str | None = None,
    ) -> None:
        if importance_batches is not None and importance_batches < 0:
            raise ValueError(f"importance_batches must be an integer >= 0 or None, got {importance_batches!r}")
        if name is not None and not name.replace("-", "_").isidentifier():
            raise ValueError(f"name must be a word or None, got {name!r}")
        self.metrics = checked_metrics([Margin(), ImportanceVariance(), ClassMargin()] if metrics is None else metrics)
        self.loss, self.weights, self.name = loss, checked_weights(weights), name
        self.chains = checked_chains(chains or {})
        self.importance_batches = importance_batches if importance else 0
        self._meter: Meter | None = None
        self._step: OneCall | None = None
        self._batches = 0
        self._said: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that this callback logs under names of its own."""
        self._said = set()
        _check_names(self, trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to measure, unless it is the sanity check."""
        self._start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to measure."""
        self._start(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Watch the step."""
        self._watch(pl_module, "validation_step")

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Watch the step."""
        self._watch(pl_module, "test_step")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Take in what was seen, and measure importance."""
        self._take_in(trainer, pl_module, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Take in what was seen, and measure importance."""
        self._take_in(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics of the epoch."""
        self._log(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics of the epoch."""
        self._log(trainer, pl_module, "test")

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Stop watching."""
        self._stop()

    on_exception = teardown

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
        if not trainer.sanity_checking:
            blocks = named_blocks(pl_module, self.chains)
            self._meter, self._batches = Meter(pl_module, self.metrics, self.weights, blocks), 0

    def _stop(self) -> None:
        if self._step is not None:
            self._step.remove()
        self._meter = self._step = None

    def _watch(self, pl_module: LightningModule, name: str) -> None:
        if self._meter is not None:
            self._step = OneCall(pl_module, name, self._meter.watch)

    def _take_in(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        if self._meter is None:
            return
        if self.importance_batches is None or self._batches < self.importance_batches:
            loss = _training_loss if self.loss is None else self.loss

            def run() -> Tensor:
                # validation runs in inference mode, whose tensors take no part in a graph
                own = tree_map_only(Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor, batch)
                with unlogged(trainer, pl_module), trainer.precision_plugin.forward_context():
                    return loss(pl_module, own)

            self._meter.importance(run)
        self._batches += 1

    def _log(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        meter, self._meter = self._meter, None
        if meter is None:
            return
        numbers, histograms, neurons = _sorted(meter.results(), stage, "" if self.name is None else f"{self.name}_")
        log_merged(pl_module, numbers)
        if trainer.is_global_zero:
            log_histograms(trainer, histograms)
            if stage == "test":  # in each epoch it would be too much to look at
                log_neurons(trainer, stage, neurons)
        for remark, say in _remarks(meter):
            if remark not in self._said:
                self._said.add(remark)
                say(f"ToleranceMetrics {remark}")


def _check_names(callback: ToleranceMetrics, trainer: Trainer) -> None:
    """Raise ValueError if another callback of the trainer logs under the same names."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    others = [each for each in callbacks if isinstance(each, ToleranceMetrics) and each is not callback]
    kinds = {type(metric) for other in others if other.name == callback.name for metric in other.metrics}
    if not kinds.isdisjoint(map(type, callback.metrics)):
        raise ValueError(
            f"two ToleranceMetrics log under the same names: give one a name=, got {callback.name!r} twice"
        )


def _remarks(meter: Meter) -> Iterator[tuple[str, Callable[[str], Any]]]:
    """Yield what there is to say of what was measured, and how to say it."""
    surrogates = [name for name, layer in meter.layers.items() if "surrogate" in layer.estimator]
    if surrogates:
        yield f"measures a surrogate of importance, the gradient, of {', '.join(surrogates)}", rank_zero_info
    for remark in meter.remarks():
        yield remark, rank_zero_warn


def _sorted(
    results: Mapping[str, Mapping[str, Any]], stage: str, prefix: str
) -> tuple[dict[str, Any], dict[str, Histogram], dict[str, dict[str, Tensor]]]:
    """Return numbers and histograms by their names in the log, and values of single neurons by metric and layer."""
    numbers: dict[str, Any] = {}
    histograms: dict[str, Histogram] = {}
    neurons: dict[str, dict[str, Tensor]] = {}
    names = short_names(list(results))
    for layer, values in results.items():
        for key, value in values.items():
            if isinstance(value, Histogram):
                histograms[f"{stage}/{prefix}{key}/{names[layer]}"] = value
            elif not isinstance(value, Tensor) or value.numel() == 1:
                numbers[f"{stage}/{prefix}{key}/{names[layer]}"] = value
            else:
                neurons.setdefault(f"{prefix}{key}", {})[names[layer]] = value
    return numbers, histograms, neurons


def _training_loss(module: LightningModule, batch: Any) -> Tensor:
    """Return the loss that ``training_step`` computes for a batch, in the mode that the module is in.

    Raises:
        ValueError: the step can't be called for its loss alone.
    """
    step = f"training_step of {type(module).__name__}"
    remedy = "give loss=... that maps (module, batch) to the loss, or importance=False"
    if not module.automatic_optimization:
        raise ValueError(f"{step} optimizes: {remedy}")
    accepted = inspect.signature(module.training_step).parameters
    if "dataloader_iter" in accepted:
        raise ValueError(f"{step} fetches its batches: {remedy}")
    result: Any = module.training_step(*([batch, 0] if len(accepted) > 1 else [batch]))
    loss = result.get("loss") if isinstance(result, dict) else result
    if not isinstance(loss, Tensor):
        raise ValueError(f"{step} returned {type(loss).__name__} and no loss: {remedy}")
    return loss
