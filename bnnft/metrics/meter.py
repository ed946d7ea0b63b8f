"""Measure margins, importance and class margin of any module, batch by batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from bnnft.injection.finder import Finder
from bnnft.injection.sites import Weights, binarized_weights
from bnnft.metrics.agreement import agree
from bnnft.metrics.class_margin import ClassMargin
from bnnft.metrics.found import alone, binarized, could_be_binarized
from bnnft.metrics.importance import Importance, measured_importance
from bnnft.metrics.importance_variance import ImportanceVariance
from bnnft.metrics.layers import Layer, checked_metrics, computed, streams, update
from bnnft.metrics.margin import Margin
from bnnft.tracing.blocks import Block, Observation, find_blocks
from bnnft.tracing.neurons import Seen, watch
from bnnft.tracing.trace import Trace


class _Watched(NamedTuple):
    seen: Seen
    finder: Finder | None
    trace: Trace | None


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
        self._model, self._weights = model, weights
        self._metrics = checked_metrics([Margin(), ImportanceVariance(), ClassMargin()] if metrics is None else metrics)
        self._named = {block.layer: block for block in blocks}
        self._ran: set[str] = set()  # modules that ran while they were traced
        self._kinds: set[type] = set()  # classes of binarized layers
        self._awake = True  # trace the next batch
        self._losses = 0  # batches with a loss
        self._stack = ExitStack()  # what watches a batch
        self._watched: _Watched | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Measure what the model computes inside of the context: one batch, in one or more forwards."""
        self.open()
        try:
            yield
        except BaseException:
            self.close(take_in=False)
            raise
        self.close()

    def open(self) -> None:
        """Start to watch a batch, where a context is of no use; :meth:`close` must follow whatever happens."""
        with self._guarded("all layers"):
            self._watched = self._start()

    def close(self, take_in: bool = True) -> None:
        """Stop watching, and take in what was seen unless the batch was cut."""
        watched, self._watched = self._watched, None
        # what is computed here is nothing of the model, for another meter that may be open around this one
        with self._guarded("all layers"), torch._C.DisableTorchFunction():
            self._stack.close()
            if watched is not None and take_in:
                self._finish(watched)

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

    def _start(self) -> _Watched:
        stack = self._stack
        finder = trace = None
        named = [block for name, block in self._named.items() if name not in self.layers]
        unseen = [name for name in could_be_binarized(self._model) if name not in self._ran]
        # a layer that has not run yet is traced when it does, if it is of a class that is binarized elsewhere
        if self._awake or any(type(self._model.get_submodule(name)) in self._kinds for name in unseen):
            finder = stack.enter_context(Finder(self._model, self._weights))
            trace = stack.enter_context(Trace(self._model))
        else:
            for name in unseen:
                hook = self._model.get_submodule(name).register_forward_pre_hook(self._wake)
                stack.callback(hook.remove)
        known = [layer.block for layer in self.layers.values()]
        return _Watched(stack.enter_context(watch(self._model, [*known, *named])), finder, trace)

    def _wake(self, module: nn.Module, args: Any) -> None:
        """Trace the next batch, since a module runs that has not run before."""
        self._awake = True

    def _finish(self, watched: _Watched) -> None:
        """Take in what a batch showed."""
        seen, finder, trace = watched
        seen.check()
        observations: dict[str, Observation] = dict(seen)
        if trace is not None and finder is not None:
            if trace.error is not None:
                raise RuntimeError(f"the forward could not be traced: {trace.error}") from trace.error
            self._awake = False
            self._ran |= {call.module for call in trace.calls}
            observations = self._learn(trace, finder) | observations
        for name, layer in self.layers.items():
            for values in streams(layer, observations[name], self.left_out) if name in observations else ():
                for metric in layer.others:
                    with self._guarded(f"{type(metric).__name__} of {name}"):
                        update(metric, values)

    def _learn(self, trace: Trace, finder: Finder) -> dict[str, Observation]:
        """Take new layers from a traced batch; return what was observed of them."""
        weights = binarized(finder)
        names = [weight.layer for weight in weights]
        found = find_blocks(trace, names)
        for weight in weights:
            name = weight.layer
            if names.count(name) > 1:
                self._leave_out("margins and importance", name, "it computes with several binarized weights")
            elif name not in found and weight.used:
                self._leave_out("margins and importance", name, "it does not run as a module")
            elif name in found and name not in self.layers:
                block = found[name][0] if name not in self._named else alone(self._named[name], trace)
                self._kinds.add(type(self._model.get_submodule(name)))
                self.layers[name] = Layer.of(block, weight.fan_in, weight.scale, self._metrics)
                if block.reason:
                    self._leave_out("margins" if block.has_outputs else "margins and importance", name, block.reason)
        for name in self._named.keys() - set(names):
            self._leave_out("margins and importance", name, "it is no binarized layer that runs")
        if not weights:
            self._leave_out("all metrics", type(self._model).__name__, "it computes with no binarized weights")
        return {name: observation for name, (_, observation) in found.items() if name not in self._named}

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
