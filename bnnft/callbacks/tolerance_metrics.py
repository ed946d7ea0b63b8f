"""Measure margins and importance of neurons while Lightning evaluates."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from inspect import signature
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric, MetricCollection

from bnnft.callbacks.training_loss import training_loss
from bnnft.injection.finder import Finder
from bnnft.injection.sites import Site, Weights, binarized_weights, no_sites
from bnnft.loggers import log_histograms, log_merged, log_neurons, short_names
from bnnft.metrics import ClassMargin, Histogram, ImportanceVariance, Margin, neuron_importance
from bnnft.tracing.blocks import Block, Observation, find_blocks
from bnnft.tracing.neurons import thresholds, watch
from bnnft.tracing.trace import Trace


class ToleranceMetrics(Callback):
    """Log what predicts bit error tolerance, at validation and test, on clean weights in eval mode.

    Each metric is measured for each layer that offers what its ``update`` asks for and is logged as
    ``val/margin/<layer>``, ``val/importance_cv/<layer>`` and so on, histograms to the loggers that show them.
    Which batch norm and activation belong to a layer is found by following tensors through the first batch.
    Outputs, gradients, batch-norm statistics and random streams of the run stay untouched.

    Args:
        metrics: metrics of :mod:`bnnft.metrics` or your own; ``Margin``, ``ImportanceVariance`` and ``ClassMargin``
            if ``None``.
        loss: ``loss(module, batch)`` for the importance, one value a sample or the batch's mean; without it the
            loss is what the module's ``training_step`` returns.
        importance_batches: measure importance on so many batches only; on all if ``None``.
        chains: for layers whose neuron outputs are not found, or wrongly: ``{layer: [norm, activation]}`` by
            qualified module names, ``norm`` may be ``None``.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.

    Raises:
        ValueError: an argument is out of range; at the first batch, no neuron outputs are found or there is no loss.

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
        importance_batches: int | None = None,
        chains: Mapping[str, Sequence[str | None]] | None = None,
        weights: Weights | None = None,
    ) -> None:
        if importance_batches is not None and importance_batches < 0:
            raise ValueError(f"importance_batches must be an integer >= 0 or None, got {importance_batches!r}")
        for layer, names in (chains or {}).items():
            if isinstance(names, str) or len(names) != 2 or names[1] is None:
                raise ValueError(f"chains must map a layer to [norm or None, activation], got {layer!r}: {names!r}")
        self.metrics = [Margin(), ImportanceVariance(), ClassMargin()] if metrics is None else list(metrics)
        self.loss, self.importance_batches, self.weights = loss, importance_batches, weights
        self.chains = dict(chains or {})
        self._sites: dict[str, Site] = {}
        self._chains: dict[str, Block] = {}
        self._named: list[Block] = []
        self._collections: dict[str, MetricCollection] = {}
        self._trace: Trace | None = None
        self._operands: Finder | None = None
        self._watch: AbstractContextManager[dict[str, Observation]] | None = None
        self._seen: dict[str, Observation] = {}
        self._batches = 0
        self._active = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weights."""
        self._start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weights."""
        self._start(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Start watching."""
        self._open(pl_module)

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Start watching."""
        self._open(pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Take in what was seen."""
        self._take_in(trainer, pl_module, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Take in what was seen."""
        self._take_in(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics of the epoch."""
        self._log(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics of the epoch."""
        self._log(trainer, pl_module, "test")

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """Stop watching."""
        self._close()
        self._active = False

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Stop watching, and forget the module."""
        self._close()
        self._chains, self._sites, self._collections, self._active = {}, {}, {}, False

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._active = not trainer.sanity_checking
        if self._active:
            binarized_weights(pl_module, self.weights)  # raises for a pattern that matches nothing
            self._batches = 0
            if not self._chains:
                self._named = [self._named_chain(pl_module, layer, *names) for layer, names in self.chains.items()]

    def _named_chain(self, pl_module: LightningModule, layer: str, norm: str | None, activation: str | None) -> Block:
        modules = dict(pl_module.named_modules())
        full = [name for name in modules if name == layer or name.endswith(f".{layer}")]
        if len(full) != 1:
            raise ValueError(f"chains: {layer!r} names {len(full)} modules of {type(pl_module).__name__}, not one")
        for name in (norm, activation):
            if name is not None and name not in modules:
                raise ValueError(f"chains: {type(pl_module).__name__} has no module {name!r}")
        return Block(full[0], norm, activation)

    def _open(self, pl_module: LightningModule) -> None:
        if not self._active:
            return
        scaled = any(site.scale is not None for site in self._sites.values())
        if not self._chains or (scaled and not self._batches):  # scales move with the weights: anew in each epoch
            self._operands = Finder(pl_module, self.weights)
            self._operands.__enter__()
        if not self._chains:
            self._trace = Trace(pl_module)
            self._trace.__enter__()
        self._watch = watch(pl_module, list(self._chains.values()) or self._named, outputs=False)
        self._seen = self._watch.__enter__()

    def _close(self) -> None:
        for context in (self._watch, self._trace, self._operands):
            if context is not None:
                context.__exit__(None, None, None)
        self._trace = self._watch = self._operands = None

    def _take_in(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        if not self._active:
            return
        trace, operands = self._trace, self._operands
        self._close()
        if operands is not None:
            self._sites = {site.layer: site for site in operands.sites()}
        if trace is not None:
            self._learn(pl_module, trace)
        if not self._collections:
            self._collections = {layer: self._collection(chain) for layer, chain in self._chains.items()}
        for layer, collection in self._collections.items():
            collection.to(pl_module.device)
            for streams in self._streams(pl_module, self._chains[layer]):
                for metric in collection.values():
                    if not _takes(metric, "importance"):
                        metric.update(**metric._filter_kwargs(**streams))
        self._seen = {}
        if self.importance_batches is None or self._batches < self.importance_batches:
            self._take_in_importance(trainer, pl_module, batch)
        self._batches += 1

    def _learn(self, pl_module: LightningModule, trace: Trace) -> None:
        """Take chains and first values from the watched batch; chains that the user named win."""
        if not self._sites:
            raise no_sites(pl_module)
        strangers = [chain.layer for chain in self._named if chain.layer not in self._sites]
        if strangers:
            raise ValueError(f"chains: {strangers[0]!r} is no binarized layer; there are {', '.join(self._sites)}")
        found = find_blocks(trace, [site.layer for site in self._sites.values()])
        self._chains = {layer: chain for layer, (chain, _) in found.items()} | {c.layer: c for c in self._named}
        self._seen = {layer: seen for layer, (_, seen) in found.items()} | self._seen
        self._judge(pl_module)

    def _judge(self, pl_module: LightningModule) -> None:
        """Say once which layers are left out of what, and raise if nothing is left."""
        hidden = [chain for chain in self._chains.values() if not chain.last]
        for number, chain in enumerate(hidden):
            norm = pl_module.get_submodule(chain.norm) if chain.norm is not None else None
            if norm is not None and getattr(norm, "running_mean", None) is None and not chain.reason:
                hidden[number] = self._chains[chain.layer] = chain._replace(
                    reason=f"{chain.norm} has no running statistics, so its neurons have no fixed threshold"
                )
        lost = [chain for chain in hidden if chain.reason]
        said = "; ".join(f"{chain.layer}: {chain.reason}" for chain in lost)
        remedy = "name them with chains={layer: [norm or None, activation]}"
        if hidden and all(chain.reason and not chain.has_outputs for chain in hidden):
            raise ValueError(
                f"ToleranceMetrics finds no neuron outputs in {type(pl_module).__name__} ({said}); {remedy}"
            )
        if lost:
            rank_zero_warn(f"ToleranceMetrics leaves layers out of the margins ({said}); {remedy} if that is wrong")
        bare = [chain.layer for chain in hidden if chain.norm is None and not chain.reason]
        if bare:
            rank_zero_warn(f"no batch norm between layer and activation of {', '.join(bare)}: margins against zero")

    def _collection(self, chain: Block) -> MetricCollection:
        offered = {"scores", "fan_in"} if chain.last else set()
        if not chain.last and not chain.reason:
            offered |= {"preactivations", "thresholds", "fan_in"}
        if chain.has_outputs:
            offered |= {"importance"}
        wanted = [metric.clone() for metric in self.metrics if _arguments(metric) <= offered]
        return MetricCollection(wanted, compute_groups=False)

    def _streams(self, pl_module: LightningModule, chain: Block) -> list[dict[str, Any]]:
        site, values = self._sites[chain.layer], self._seen[chain.layer].preactivations
        if chain.reason:
            return []
        threshold = 0.0 if chain.norm is None else thresholds(pl_module.get_submodule(chain.norm))
        scale = site.scale
        if scale is not None:
            # a flip moves the pre-activation by twice the layer's scale: in units of the scale it is what it is without
            values = [value / scale.view(-1, *[1] * (value.dim() - 2)) for value in values]
            threshold = threshold / scale
        if chain.last:
            return [{"scores": scores, "fan_in": site.fan_in} for scores in values]
        return [{"preactivations": value, "thresholds": threshold, "fan_in": site.fan_in} for value in values]

    def _take_in_importance(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        chains = {layer: chain for layer, chain in self._chains.items() if chain.has_outputs}
        metrics = [metric for collection in self._collections.values() for metric in collection.values()]
        estimators: set[Any] = {metric.estimator for metric in metrics if _takes(metric, "importance")}
        loss = partial(training_loss, trainer) if self.loss is None else self.loss

        # validation runs in inference mode, whose tensors take no part in a graph: leave it, with copies
        with isolate_rng(), torch.inference_mode(False), torch.enable_grad():
            own = tree_map_only(Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor, batch)

            def run() -> Tensor:
                with trainer.precision_plugin.forward_context():
                    return loss(pl_module, own)

            importance = {each: neuron_importance(pl_module, chains, run, each) for each in estimators}
        for layer, collection in self._collections.items():
            for metric in collection.values():
                if _takes(metric, "importance"):
                    metric.update(importance[metric.estimator][layer])

    def _log(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self._active:
            return
        numbers: dict[str, Any] = {}
        histograms: dict[str, Histogram] = {}
        neurons: dict[str, dict[str, Tensor]] = {}
        names = short_names(list(self._collections))
        for layer, collection in self._collections.items():
            for key, value in collection.compute().items():
                if isinstance(value, Histogram):
                    histograms[f"{stage}/{key}/{names[layer]}"] = value
                elif not isinstance(value, Tensor) or value.numel() == 1:
                    numbers[f"{stage}/{key}/{names[layer]}"] = value
                else:
                    neurons.setdefault(key, {})[names[layer]] = value
            collection.reset()
        log_merged(pl_module, numbers)
        if trainer.is_global_zero:
            log_histograms(trainer, histograms)
            if stage == "test":  # in each epoch it would be too much to look at
                log_neurons(trainer, stage, neurons)
        self._active = False


def _arguments(metric: Metric) -> set[str]:
    return set(signature(metric.update).parameters)


def _takes(metric: Metric, argument: str) -> bool:
    return argument in _arguments(metric)
