"""What follows each binarized layer: its batch norm and its binary neurons, found by following tensors.

The order of modules does not tell: pooling, dropout or reshaping may stand between them, layers may share an
activation, or the code may simply run in another order. So one forward is traced, operation by operation, and each
layer's output is followed to the first tensor of two values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from bnnft.tracing.trace import Call, Node, Trace
from bnnft.tracing.tracking import LINEAR_MAPS, Place

_ADDING = {"add", "iadd", "radd", "sub", "isub", "rsub", "addcmul", "addcdiv"}
_SHAPING = {"view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "movedim", "squeeze", "unsqueeze"}
_SHAPING |= {"contiguous", "clone", "detach", "get", "getitem", "to", "type", "type_as", "float", "double", "half"}
_SHAPING |= {"bfloat16", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"}  # nothing, in eval mode
_SIGN_KEEPING = {"hardtanh", "tanh", "softsign"}
_MOST_ZEROS = 0.2  # share of them among signs: of sums of 16 signs one in five is 0
_TOLERANCE = 1e-3  # of magnitudes that count as equal: x + (sign(x) - x) is rounded


class Calls(NamedTuple):
    """Which of a module's calls belong to a layer, where several layers share the module.

    Attributes:
        which: numbers of these calls within one forward.
        of: calls of the module in one forward.
    """

    which: tuple[int, ...] = (0,)
    of: int = 1


class Block(NamedTuple):
    """What follows one binarized layer.

    Attributes:
        layer: qualified name of the layer.
        norm: qualified name of its batch norm, or ``None``: then the threshold is 0.
        activation: qualified name of the module whose output is the layer's binary neurons, or ``None``.
        place: of the operation whose result they are, where no module returns them, or ``None``.
        reason: why there is no known threshold; empty if there is.
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
    place: Place | None = None

    @property
    def has_outputs(self) -> bool:
        """Tell whether it is known where the layer's binary neurons are."""
        return self.activation is not None or self.place is not None


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


class _Step(NamedTuple):
    """From one value to the next by an operation."""

    node: Node
    given: int
    made: int


class _Path(NamedTuple):
    """The way of one run of a layer to its binary neurons; without an end there are none."""

    start: int
    steps: tuple[_Step, ...] = ()
    end: int | None = None
    last: bool = False


class _Run(NamedTuple):
    """One run of a layer: calls of its batch norm and activation, and the values before and after them."""

    norm: Call | None
    activation: Call | None
    place: Place | None
    reason: str
    pooled: bool
    before: int
    after: int

    def modules(self) -> tuple[str | None, str | None]:
        return self.norm.module if self.norm else None, self.activation.module if self.activation else None


def find_blocks(trace: Trace, layers: Sequence[str]) -> dict[str, tuple[Block, Observation]]:
    """Return for each layer that ran in a traced forward its chain, and what it computed."""
    return _Blocks(trace).of(layers)


class _Blocks:
    """Follows the values of a trace."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._consumers: dict[int, list[Node]] = {}
        for node in trace.nodes:
            for value in node.inputs:
                self._consumers.setdefault(value, []).append(node)
        self._looked: dict[tuple[int, bool], bool] = {}  # every path asks again, and each look reads the whole tensor

    def of(self, layers: Sequence[str]) -> dict[str, tuple[Block, Observation]]:
        """Return for each layer that ran its chain and what it computed."""
        layers = [layer for layer in dict.fromkeys(layers) if layer in self._trace.runs]
        forwards = self._trace.runs.get(_common_module(layers), 1)
        found = {}
        for layer in layers:
            starts = [call.outputs[0] for call in self._trace.calls if call.module == layer and call.outputs]
            paths = [self._follow(start) for start in starts]
            if paths:
                found[layer] = self._judge(layer, paths, forwards)
        return found

    def _follow(self, start: int) -> _Path:
        """Walk from a layer's output to the first tensor of two values, breadth first."""
        ways: dict[int, tuple[_Step, ...]] = {start: ()}
        reached, last, ends = [start], True, list[int]()
        while reached:
            value = reached.pop(0)
            for node in self._consumers.get(value, ()):
                if node.operation.startswith(LINEAR_MAPS):
                    last = False
                    continue
                for output in node.outputs:
                    if output not in ways:
                        ways[output] = (*ways[value], _Step(node, value, output))
                        reached.append(output)
                        if self._binary(output, symmetric=True):
                            ends.append(output)
        # class scores can be of one size by themselves, two of them with opposite signs, say
        if not ends or (last and self._binary(start, symmetric=True)):
            return _Path(start, last=last)
        # the first of two values may be made inside of a module that returns another one made of it, or on the side
        # of the one that is computed with
        returned = {value for call in self._trace.calls for value in call.outputs}
        same = [end for end in ends if end in returned and self._made_of(end, ends[0], ways[end])]
        shape = self._trace.values[ends[0]].shape
        used = [end for end in ends if self._trace.values[end].shape == shape and self._feeds(end)]
        end = (same or used or ends)[0]
        return _Path(start, ways[end], end)

    def _feeds(self, value: int) -> bool:
        """Tell whether a value goes into a linear map, as it is or as other values of two numbers made of it."""
        for node in self._consumers.get(value, ()):
            if node.operation.startswith(LINEAR_MAPS):
                return True
            if any(self._binary(output, symmetric=True) and self._feeds(output) for output in node.outputs):
                return True
        return False

    def _made_of(self, value: int, first: int, way: tuple[_Step, ...]) -> bool:
        """Tell whether a value is the first one of two values, or made of it without another shape or more values."""
        made = [step.made for step in way]
        between = made[made.index(first) :] if first in made else []
        shape = self._trace.values[first].shape
        return bool(between) and all(self._binary(v) and self._trace.values[v].shape == shape for v in between)

    def _binary(self, value: int, symmetric: bool = False) -> bool:
        if (value, symmetric) not in self._looked:
            self._looked[value, symmetric] = self._look(value, symmetric)
        return self._looked[value, symmetric]

    def _look(self, value: int, symmetric: bool) -> bool:
        """Tell whether a value holds two numbers only, if asked of equal size, for every sample and neuron.

        With equal size a few zeros are let pass, which torch.sign makes of zeros.
        """
        tensor = self._trace.values[value].detach()
        if tensor.dim() < 2 or tensor.numel() == 0 or not self._trace.holds(value):
            return False
        if not symmetric and bool(((tensor == tensor.max()) | (tensor == tensor.min())).all()):
            return True
        if not tensor.is_floating_point():
            return False
        sizes, zero = tensor.abs(), tensor == 0
        high = sizes.max()
        equal = bool(high > 0) and bool(((high - sizes <= _TOLERANCE * high) | zero).all())
        few = float(zero.float().mean()) <= _MOST_ZEROS and bool(tensor.min() < 0) and bool(tensor.max() > 0)
        return equal and (few or not bool(zero.any()))

    def _judge(self, layer: str, paths: list[_Path], forwards: int) -> tuple[Block, Observation]:
        if all(path.end is None for path in paths):
            if all(path.last for path in paths):
                return Block(layer, last=True), Observation([self._trace.values[path.start] for path in paths])
            return Block(layer, reason="its outputs are not binary"), Observation()
        runs = [self._run(path, path.end) for path in paths if path.end is not None]
        first = runs[0]
        reason = next((run.reason for run in runs if run.reason), "")
        if len(runs) < len(paths) or any(run.modules() != first.modules() for run in runs):
            reason = reason or "its runs end in different modules"
        if first.activation is None and first.pooled:
            reason = reason or "its binary outputs are not the output of a module"  # nor is what comes of the pooling
        norm_calls = self._calls_of([run.norm for run in runs], forwards)
        activation_calls = self._calls_of([run.activation for run in runs], forwards)
        place = self._place_of(runs) if first.activation is None else None
        chain = Block(layer, *first.modules(), reason, False, first.pooled, norm_calls, activation_calls, place)
        values = self._trace.values
        return chain, Observation([values[run.before] for run in runs], [values[run.after] for run in runs])

    def _run(self, path: _Path, end: int) -> _Run:
        """Find batch norm and activation of one run, and what on the way makes its threshold unknown."""
        steps = [step for step in path.steps if not self._binary(step.made)]
        middle = next((number for number, step in enumerate(steps) if step.node.operation == "batch_norm"), len(steps))
        before, norms, after = steps[:middle], [step.node for step in steps[middle : middle + 1]], steps[middle + 1 :]
        pooled = any("max_pool" in step.node.operation for step in before)
        early, late = (before, after) if norms or pooled else ([], before)
        shapes = [step.node.operation for step in early]
        wrong = [operation for operation in shapes if operation not in _SHAPING and "max_pool" not in operation]
        wrong += [step.node.operation for step in late if not self._keeps_signs(step)]
        reason, norm = "", None
        if norms:
            calls = [call for call in self._trace.calls if call.outputs == norms[0].outputs]
            norm = next((call for call in calls if call.module == norms[0].place.module), None)
            if norm is None or not hasattr(self._trace.model.get_submodule(norm.module), "running_mean"):
                norm, reason = None, "its batch norm is no module"
        if wrong:
            what = "something is added to it" if wrong[0] in _ADDING else f"{wrong[0]} changes it"
            reason = f"{what} before it is binarized, so its threshold is not known"
        activation = next((call for call in self._trace.calls if end in call.outputs), None)
        place = path.steps[-1].node.place if path.steps else None
        start = before[-1].made if before and (norms or pooled) else path.start
        return _Run(norm, activation, place, reason, pooled and not norms, start, end)

    def _place_of(self, runs: Sequence[_Run]) -> Place | None:
        """Return the one place of all runs, if it runs for none but this layer."""
        place = runs[0].place
        alone = place is not None and self._trace.runs.get(place.module) == len(runs)
        return place if alone and all(run.place == place for run in runs) else None

    def _keeps_signs(self, step: _Step) -> bool:
        if step.node.operation in _SHAPING:
            return True
        before, after = (self._trace.values[value].detach() for value in (step.given, step.made))
        known = step.node.operation in _SIGN_KEEPING or self._trace.holds(step.given)
        added = step.node.operation in _ADDING  # whatever the sum does in this batch
        return known and not added and torch.equal(before.sign(), after.sign())

    def _calls_of(self, calls: Sequence[Call | None], forwards: int) -> Calls:
        known = [call for call in calls if call is not None]
        if not known:
            return Calls()
        runs = self._trace.runs[known[0].module]
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
