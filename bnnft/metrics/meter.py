"""Measure margins, importance and class margin of any module, batch by batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from bnnft.injection.sites import Weights, binarized_weights
from bnnft.metrics.agreement import agree
from bnnft.metrics.class_margin import ClassMargin
from bnnft.metrics.found import LayerFinder
from bnnft.metrics.importance import Importance, measured_importance
from bnnft.metrics.importance_variance import ImportanceVariance
from bnnft.metrics.layers import Layer, checked_metrics, computed, streams, update
from bnnft.metrics.margin import Margin
from bnnft.tracing.blocks import Block, Observation
from bnnft.tracing.neurons import Seen, watch


class Meter:
    """Measures a module's neurons over some batches, on clean weights in eval mode; its own errors end no run.

    What can't be measured is left out, and :attr:`left_out` says why. Outputs, gradients, statistics and random streams
    are as they would be without it. Use one meter for one pass over data.

    Args:
        model: any module.
        metrics: metrics of :mod:`bnnft.metrics` or your own, which are copied for each layer; a metric is measured for
            the layers that offer what its ``update`` asks for. ``Margin``, ``ImportanceVariance`` and ``ClassMargin``
            if ``None``.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.
        blocks: of layers whose batch norm and activation are to be these modules.

    Attributes:
        left_out: reasons, by what is left out.
        moved: names of what a loss has moved in the model and what can't be put back.
        layers: what is measured, by layer.

    Raises:
        ValueError: a pattern of ``weights`` matches nothing, or two metrics are of one class.

    Example:
        >>> from bnnft.nn import BinaryActivation, BinaryLinear
        >>> model = nn.Sequential(BinaryLinear(8, 6), nn.BatchNorm1d(6), BinaryActivation(), BinaryLinear(6, 3)).eval()
        >>> meter, x, y = Meter(model), torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
        >>> with meter.watch():
        ...     _ = model(x)
        >>> meter.importance(lambda: nn.functional.cross_entropy(model(x), y, reduction="none"))
        >>> {layer: next(iter(values)) for layer, values in meter.results().items()}
        {'0': 'margin', '3': 'class_margin'}
    """

    def __init__(
        self,
        model: nn.Module,
        metrics: Sequence[Metric] | None = None,
        weights: Weights | None = None,
        blocks: Sequence[Block] = (),
    ) -> None:
        binarized_weights(model, weights)  # raises for a pattern that matches nothing
        self.layers: dict[str, Layer] = {}
        self.left_out: dict[str, str] = {}
        self.moved: list[str] = []
        self._model = model
        self._metrics = checked_metrics([Margin(), ImportanceVariance(), ClassMargin()] if metrics is None else metrics)
        self._finder = LayerFinder(model, weights, blocks, self._leave_out)
        self._losses = 0  # batches with a loss

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Measure what the model computes inside of the context: one batch, in one or more forwards."""
        with ExitStack() as stack:
            seen, traced = Seen(), None
            with self._guarded("all layers"):
                traced = self._finder.trace(stack)
                seen = stack.enter_context(watch(self._model, self._finder.blocks()))
            yield
        # what is computed here is nothing of the model, for another meter that may be open around this one
        with self._guarded("all layers"), torch._C.DisableTorchFunction():
            seen.check()
            observations: dict[str, Observation] = dict(seen)
            for name, (weights, block, first) in self._finder.learn(*traced).items() if traced is not None else ():
                self.layers[name] = Layer.of(block, weights.fan_in, weights.scale, self._metrics)
                observations.setdefault(name, first)
            self._take_in(observations)

    def _take_in(self, observations: Mapping[str, Observation]) -> None:
        for name, layer in self.layers.items():
            for values in streams(layer, observations[name], self.left_out) if name in observations else ():
                for metric in layer.others:
                    with self._guarded(f"{type(metric).__name__} of {name}"):
                        update(metric, values)

    def importance(self, loss: Callable[[], Tensor]) -> None:
        """Measure importance on one batch.

        Args:
            loss: runs the model on the batch and returns its loss: one value a sample, or, for the estimator
                ``"gradient"`` only, the mean over the batch. What it changes in the model is put back.
        """
        self._losses += 1
        for estimator in dict.fromkeys(m.estimator for layer in self.layers.values() for m in layer.importances):
            own = {name: each.block for name, each in self.layers.items() if each.importance(estimator) is not None}
            result = Importance({}, {}, [])
            # evaluation may run in inference mode, whose tensors take no part in a graph
            with self._guarded("importance"), torch.inference_mode(False), torch.enable_grad():
                result = measured_importance(self._model, own, loss, estimator)
            self.moved += [name for name in result.moved if name not in self.moved]
            reasons = result.reasons | _blocked(own, result.values)
            for name, reason in reasons.items():
                self._leave_out("importance", name, reason)
            for name, values in result.values.items():
                metric = self.layers[name].importance(estimator)
                if metric is not None and name not in reasons:
                    with self._guarded(f"importance of {name}"):
                        update(metric, {"importance": values})

    def results(self) -> dict[str, dict[str, Any]]:
        """Return by layer what its metrics computed, over all processes of a distributed run, which must all ask.

        Numbers that are not defined are left out, the margin of a layer whose neurons are all dead, say.
        """
        self.layers, self.left_out = agree(self.layers, self.left_out, self._metrics)
        for name, layer in self.layers.items():
            if self._losses and any(not metric.update_called for metric in layer.importances):
                self.left_out.setdefault(f"importance of {name}", "its neurons did not run in the loss")
        return {name: values for name, layer in self.layers.items() if (values := computed(layer))}

    def remarks(self) -> list[str]:
        """Return in sentences what was left out and why, and what to know of the rest."""
        return list(_remarks(self))

    def _leave_out(self, what: str, name: str, reason: str) -> None:
        self.left_out.setdefault(f"{what} of {name}", reason)

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """Note an error as the reason why something is left out."""
        try:
            yield
        except Exception as error:
            self.left_out.setdefault(what, f"{error or type(error).__name__}")


def _blocked(blocks: Mapping[str, Block], values: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the layers whose importance is 0 throughout, though that of others is not."""
    if not any(bool(each.any()) for each in values.values()):
        return {}
    reason = "no gradient passes the signs behind it; the estimator 'flip' is exact"
    return {name: reason for name, each in values.items() if blocks[name].surrogate and not bool(each.any())}


def _remarks(meter: Meter) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for what, reason in meter.left_out.items():
        reasons.setdefault(reason, []).append(what)
    if reasons:
        yield "leaves out " + "; ".join(f"{', '.join(things)}: {reason}" for reason, things in reasons.items())
    hidden = {name: layer.block for name, layer in meter.layers.items() if layer.others and not layer.block.last}
    bare = [name for name, block in hidden.items() if not block.normed and not block.reason]
    if bare:
        yield f"finds no batch norm between layer and neurons of {', '.join(bare)}: margins against zero"
    if meter.moved:
        names = ", ".join(meter.moved)
        yield f"cannot put back what the loss has moved: {names}; give a loss= that moves nothing, or importance=False"
