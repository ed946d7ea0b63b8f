"""Run the end of a traced forward again with other neuron outputs, and only what depends on them."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bnnft.tracing.trace import READING, Node, Trace
from bnnft.tracing.tracking import is_alive

_EXACT = {torch.float32, torch.float64}
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


class Replay:
    """Computes a value of a traced forward as it would be with other values before it.

    Where a linear map is given a changed input, only the changed features or channels are multiplied and added to what
    was its result: for one neuron a rank-one update.

    Args:
        trace: of the forward, under ``torch.no_grad``.
        starts: numbers of the values that are to change, in the order in which they were made.
        end: number of the value to compute.

    Raises:
        ValueError: the model read numbers that depend on the starts into Python, or the end does not depend on them.
    """

    def __init__(self, trace: Trace, starts: Sequence[int], end: int) -> None:
        self._trace, self._starts, self._end = trace, set(starts), end
        reached = set(starts)
        behind: list[Node] = []
        for node in trace.nodes:
            if not reached.isdisjoint(node.inputs):
                reached.update(node.outputs)
                behind.append(node)
        if any(name in READING and not reached.isdisjoint(inputs) for name, inputs in trace.read):
            raise ValueError("the model reads numbers that depend on its neurons into Python")
        needed = {end}
        self._nodes: list[Node] = []
        for node in reversed(behind):
            if not needed.isdisjoint(node.outputs):
                needed.update(node.inputs)
                self._nodes.insert(0, node)
        for node in self._nodes:
            if len(node.written) > 1 and not reached.issuperset(before for before, _ in node.written):
                raise ValueError("the model writes to a view of what does not depend on its neurons")
            if not all(is_alive(trace.values[value]) for value in node.inputs):
                raise ValueError("a value is there no more")
        if end not in reached or any(node.call is None for node in self._nodes):
            raise ValueError("the way from the neurons cannot be seen")

    @torch.no_grad()
    def run(self, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the end with every start changed by a function."""
        first = self._starts - {value for node in self._nodes for value in node.outputs}
        made = {value: change(self._trace.values[value]) for value in first}
        for node in self._nodes:
            results = self._updated(node, made) or node.run(partial(self._given, node, made))
            for value in results.keys() & set(node.outputs):
                made[value] = change(results[value]) if value in self._starts else results[value]
        return made[self._end]

    def _given(self, node: Node, made: dict[int, Tensor], value: int) -> Tensor:
        """Return what an operation is given; what it writes to must not be a value of the trace."""
        if value in made:
            return made[value]
        tensor = self._trace.values[value]
        return tensor.clone() if any(value == before for before, _ in node.written) else tensor

    def _updated(self, node: Node, made: dict[int, Tensor]) -> dict[int, Tensor] | None:
        """Return the result of a linear map by what has changed of its input, where that is less to do."""
        value = node.inputs[0]
        if node.call is None or value not in made or any(other in made for other in node.inputs[1:]):
            return None
        function, args, kwargs = node.call
        before, after = self._trace.values[value], made[value]
        result = self._trace.values[node.outputs[0]]
        if len(args) < 2 or len(node.inputs) < 2 or before.shape != after.shape or result.dtype not in _EXACT:
            return None
        given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        weight = self._trace.values[node.inputs[1]]
        if function is F.linear:
            dim = before.dim() - 1
        elif function in _CONVOLUTIONS and before.dim() == weight.dim() and given.get("groups", 1) == 1:
            dim = 1
        else:
            return None
        changed = _changed(before, after, dim)
        if changed is None or not len(changed):
            return None if changed is None else {node.outputs[0]: result}
        difference = (after - before).index_select(dim, changed)
        how = {name: given[name] for name in _ARGUMENTS[3:6] if name in given}
        return {node.outputs[0]: result + function(difference, weight.index_select(1, changed), **how)}


def _changed(before: Tensor, after: Tensor, dim: int) -> Tensor | None:
    """Return which indices of a dimension have changed, ``None`` if that is more than half of them."""
    others = [place for place in range(before.dim()) if place != dim]
    changed = (before != after).sum(others).nonzero().squeeze(1)
    return changed if 2 * len(changed) <= before.shape[dim] else None
