"""What follows each binarized layer: its batch norm and its binary neurons, found by following tensors.

The order of modules does not tell: pooling, dropout or reshaping may stand between them, layers may share an
activation, or the code may simply run in another order. So one forward is traced, operation by operation, and each
layer's output is followed to the first tensor of two values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnnft.sites import Site
from bnnft.tracking import Tracking, tensors

_ADDING = {"add", "iadd", "radd", "sub", "isub", "rsub", "addcmul", "addcdiv"}
_SHAPING = {"view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "movedim", "squeeze", "unsqueeze"}
_SHAPING |= {"contiguous", "clone", "detach", "get", "getitem", "to", "type", "type_as", "float", "double", "half"}
_SHAPING |= {"bfloat16", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"}  # nothing, in eval mode
_SIGN_KEEPING = {"hardtanh", "tanh", "softsign"}


class Calls(NamedTuple):
    """Which of a module's calls belong to a layer, where several layers share the module.

    Attributes:
        which: numbers of these calls within one forward.
        of: calls of the module in one forward.
    """

    which: tuple[int, ...] = (0,)
    of: int = 1


class Chain(NamedTuple):
    """What follows one binarized layer.

    Attributes:
        layer: qualified name of the layer.
        norm: qualified name of its batch norm, or ``None``: then the threshold is 0.
        activation: qualified name of the module whose output is the layer's binary neurons, or ``None``.
        reason: why there are no neuron outputs or no known threshold; empty if there are.
        last: no other layer follows: the layer's outputs are class scores.
        pooled: there is pooling, but no batch norm: the input of the activation is the pre-activation.
        norm_calls: which runs of the batch norm are the layer's.
        activation_calls: which runs of the activation are the layer's.
    """

    layer: str
    norm: str | None = None
    activation: str | None = None
    reason: str = ""
    last: bool = False
    pooled: bool = False
    norm_calls: Calls = Calls()
    activation_calls: Calls = Calls()


@dataclass
class Observation:
    r"""What one layer computed in the watched forwards, a tensor for each run.

    Attributes:
        preactivations: inputs of the batch norm, shape (N, neurons, \*positions); without a batch norm the
            layer's outputs, or what pooling made of them; of the last layer its outputs.
        outputs: binary neuron outputs; empty for the last layer.
    """

    preactivations: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


class _Node(NamedTuple):
    operation: str
    module: str  # innermost module that ran it
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class _Call(NamedTuple):
    module: str
    number: int  # among all calls of this module
    outputs: tuple[int, ...]


class _Path(NamedTuple):
    """The way of one run of a layer to its binary neurons; without an end there are none."""

    start: int
    nodes: tuple[_Node, ...] = ()
    end: int | None = None
    last: bool = False


class _Run(NamedTuple):
    """One run of a layer: calls of its batch norm and activation, and the values before and after them."""

    norm: _Call | None
    activation: _Call | None
    reason: str
    pooled: bool
    before: int
    after: int

    def modules(self) -> tuple[str | None, str | None]:
        return self.norm.module if self.norm else None, self.activation.module if self.activation else None


class Trace(Tracking):
    """Records which operation made which value from which, while active; changes nothing of the run.

    A value is what a tensor held between two writes. The trace keeps a reference to every intermediate result, so use
    it for one batch and drop it.

    Args:
        model: the module that is to run.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._starts: list[tuple[tuple[int, ...], int]] = []  # of each running module: its inputs, nodes before it
        self._values: list[Tensor] = []
        self._current: dict[int, int] = {}  # identity of a tensor to the value it holds
        self._nodes: list[_Node] = []
        self._calls: list[_Call] = []
        self._runs: dict[str, int] = {}

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run and record one operation."""
        name, inputs = getattr(func, "__name__", ""), tensors((args, kwargs))
        numbers = tuple(map(self._number, inputs))
        versions = [None if tensor.is_inference() else tensor._version for tensor in inputs]
        result = func(*args, **kwargs)
        written = []
        for tensor, version in zip(inputs, versions, strict=True):
            in_place = name.startswith(("__i", "__setitem")) or (name.endswith("_") and not name.endswith("__"))
            if (in_place and tensor is inputs[0]) if version is None else tensor._version != version:
                self._current.pop(id(tensor), None)  # it holds a new value now
                written.append(tensor)
        self._record(name.strip("_"), numbers, tuple(map(self._number, (*tensors(result), *written))))
        return result

    def _number(self, tensor: Tensor) -> int:
        if id(tensor) not in self._current:
            self._current[id(tensor)] = len(self._values)
            self._values.append(tensor)
        return self._current[id(tensor)]

    def _record(self, operation: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> None:
        made = tuple(value for value in outputs if value not in inputs)
        if inputs and made:
            self._nodes.append(_Node(operation, self.within[-1] if self.within else "", inputs, made))

    def entered(self, name: str, inputs: tuple[Tensor, ...]) -> None:
        """Take note of what a module is given."""
        self._starts.append((tuple(map(self._number, inputs)), len(self._nodes)))

    def left(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        """Take note of what a module returns."""
        given, before = self._starts.pop()
        made = tuple(map(self._number, outputs))
        reached = set(given)
        for node in self._nodes[before:]:
            if not reached.isdisjoint(node.inputs):
                reached.update(node.outputs)
        if reached.isdisjoint(made):  # by what is no torch function: an autograd.Function, say
            self._record(type(module).__name__, given, made)
        self._calls.append(_Call(name, self._runs.get(name, 0), made))
        self._runs[name] = self._runs.get(name, 0) + 1

    def chains(self, sites: Sequence[Site]) -> dict[str, tuple[Chain, Observation]]:
        """Return for each layer that ran its chain and what it computed."""
        consumers: dict[int, list[_Node]] = {}
        for node in self._nodes:
            for value in node.inputs:
                consumers.setdefault(value, []).append(node)
        layers = [layer for layer in dict.fromkeys(site.layer for site in sites) if layer in self._runs]
        forwards = self._runs.get(_common_module(layers), 1)
        found = {}
        for layer in layers:
            starts = [call.outputs[0] for call in self._calls if call.module == layer and call.outputs]
            paths = [self._follow(start, consumers) for start in starts]
            if paths:
                found[layer] = self._judge(layer, paths, forwards)
        return found

    def _follow(self, start: int, consumers: Mapping[int, list[_Node]]) -> _Path:
        """Walk from a layer's output to the first tensor of two values, breadth first."""
        ways: dict[int, tuple[_Node, ...]] = {start: ()}
        reached, last, end = [start], True, None
        while reached:
            value = reached.pop(0)
            for node in consumers.get(value, ()):
                if node.operation == "linear" or node.operation.startswith(("conv", "matmul", "mm", "bmm", "addmm")):
                    last = False
                    continue
                for output in node.outputs:
                    if output not in ways:
                        ways[output] = (*ways[value], node)
                        reached.append(output)
                        if end is None and self._binary(output, symmetric=True):
                            end = output
        # class scores can be of one size by themselves, two of them with opposite signs, say
        if end is None or (last and self._binary(start, symmetric=True)):
            return _Path(start, last=last)
        return _Path(start, ways[end], end)

    def _binary(self, value: int, symmetric: bool = False) -> bool:
        """Tell whether a value holds two numbers only, if asked of equal size, for every sample and neuron."""
        tensor = self._values[value].detach()
        if tensor.dim() < 2 or tensor.numel() == 0 or self._current.get(id(self._values[value])) != value:
            return False
        if not symmetric:
            return bool(((tensor == tensor.max()) | (tensor == tensor.min())).all())
        return (
            tensor.is_floating_point()
            and bool(tensor.abs().max() > 0)
            and bool((tensor.abs() == tensor.abs().max()).all())
        )

    def _judge(self, layer: str, paths: list[_Path], forwards: int) -> tuple[Chain, Observation]:
        if all(path.end is None for path in paths):
            if all(path.last for path in paths):
                return Chain(layer, last=True), Observation([self._values[path.start] for path in paths])
            return Chain(layer, reason="its outputs are not binary"), Observation()
        runs = [self._run(path, path.end) for path in paths if path.end is not None]
        first = runs[0]
        reason = next((run.reason for run in runs if run.reason), "")
        if len(runs) < len(paths) or any(run.modules() != first.modules() for run in runs):
            reason = reason or "its runs end in different modules"
        if first.activation is None:
            reason = reason or "its binary outputs are not the output of a module"
        calls = [self._calls_of([getattr(run, part) for run in runs], forwards) for part in ("norm", "activation")]
        chain = Chain(layer, *first.modules(), reason, False, first.pooled, *calls)
        return chain, Observation([self._values[r.before] for r in runs], [self._values[r.after] for r in runs])

    def _run(self, path: _Path, end: int) -> _Run:
        """Find batch norm and activation of one run, and what on the way makes its threshold unknown."""
        steps = [node for node in path.nodes if not any(self._binary(value) for value in node.outputs)]
        place = next((number for number, node in enumerate(steps) if node.operation == "batch_norm"), len(steps))
        before, norms, after = steps[:place], steps[place : place + 1], steps[place + 1 :]
        pooled = any("max_pool" in node.operation for node in before)
        early, late = (before, after) if norms or pooled else ([], before)
        wrong = [n.operation for n in early if n.operation not in _SHAPING and "max_pool" not in n.operation]
        wrong += [n.operation for n in late if n.operation not in _SHAPING and not self._keeps_signs(n)]
        reason, norm = "", None
        if norms:
            norm = next((c for c in self._calls if c.outputs == norms[0].outputs and c.module == norms[0].module), None)
            if norm is None or not hasattr(self._model.get_submodule(norm.module), "running_mean"):
                norm, reason = None, "its batch norm is no module"
        if wrong:
            what = "something is added to it" if wrong[0] in _ADDING else f"{wrong[0]} changes it"
            reason = f"{what} before it is binarized, so its threshold is not known"
        activation = next((call for call in self._calls if end in call.outputs), None)
        start = before[-1].outputs[0] if before and (norms or pooled) else path.start
        return _Run(norm, activation, reason, pooled and not norms, start, end)

    def _keeps_signs(self, node: _Node) -> bool:
        before, after = (self._values[values[0]].detach() for values in (node.inputs, node.outputs))
        return node.operation in _SIGN_KEEPING and torch.equal(before.sign(), after.sign())

    def _calls_of(self, calls: Sequence[_Call | None], forwards: int) -> Calls:
        known = [call for call in calls if call is not None]
        if not known:
            return Calls()
        runs = self._runs[known[0].module]
        each = runs // forwards if runs % forwards == 0 else runs
        which = tuple(sorted({call.number % each for call in known}))
        return Calls() if which == tuple(range(each)) else Calls(which, each)


def _common_module(layers: Sequence[str]) -> str:
    """Return the name of the smallest module that holds all layers."""
    parts = [layer.split(".")[:-1] for layer in layers]
    shared = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)
