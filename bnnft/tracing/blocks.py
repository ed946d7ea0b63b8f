"""What follows each binarized layer: its batch norm and its binary neurons, found by following tensors.

The order of modules does not tell: pooling, dropout or reshaping may stand between them, layers may share an
activation, norm and sign may stand in the forward of a parent module. So one forward is traced, operation by
operation, and each layer's output is followed to the first tensor of two values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from bnnft.tracing.axis import RESHAPING, Axis, axis_of, carried, numbered
from bnnft.tracing.trace import Trace
from bnnft.tracing.ways import ADDING, Step, Way, Ways

_SHAPING = RESHAPING | {"contiguous", "clone", "detach", "get", "to", "type", "type_as", "float", "double", "half"}
_SHAPING |= {"bfloat16", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"}  # nothing, in eval mode
_SIGN_KEEPING = {"hardtanh", "tanh", "softsign"}


class Route(NamedTuple):
    """The operations from a layer's output to its binary neurons, by which the neurons are found in any forward.

    Attributes:
        operations: their names, in order; ``@`` and a module's name where its inside cannot be seen.
        measured: how many of them make the pre-activation out of the layer's output.
        normed: the next one is the batch norm.
        before: dimension of the neurons in the pre-activation; ``None`` where it is not known, and of class scores.
        after: in the binary outputs; ``None`` where it is not known.
    """

    operations: tuple[str, ...] = ()
    measured: int = 0
    normed: bool = False
    before: Axis | None = None
    after: Axis | None = None


class Block(NamedTuple):
    """One binarized layer, its batch norm, and its binary neurons; found by a route or named by modules.

    Attributes:
        layer: qualified name of the layer.
        norm: qualified name of the batch norm, where it was named; without one the threshold is 0.
        activation: qualified name of the module whose output is the layer's binary neurons, where it was named.
        reason: why there is no known threshold; empty if there is.
        last: no other layer follows: the layer's outputs are class scores.
        route: where the neurons are; ``None`` where they were named or there are none.
        surrogate: other binary neurons follow, so that a gradient passes their straight-through estimators.
    """

    layer: str
    norm: str | None = None
    activation: str | None = None
    reason: str = ""
    last: bool = False
    route: Route | None = None
    surrogate: bool = False

    @property
    def has_outputs(self) -> bool:
        """Return whether it is known where the layer's binary neurons are."""
        return not self.last and (self.activation is not None or self.route is not None)

    @property
    def normed(self) -> bool:
        """Return whether there is a batch norm between the layer and its neurons."""
        return self.norm is not None if self.route is None else self.route.normed


@dataclass
class Observation:
    r"""What one layer computed in the watched forwards, an entry for each run.

    Attributes:
        preactivations: copies, shape (N, neurons, \*positions); of the last layer its outputs as they are.
        thresholds: of the neurons at that time, shape (neurons,), 0 without a batch norm; ``None`` where they are not
            known: the batch norm took the statistics of the batch, or the neurons were in another dimension.
        outputs: binary neuron outputs, in the shape that the network has them in; empty for the last layer.
    """

    preactivations: list[Tensor] = field(default_factory=list)
    thresholds: list[Tensor | float | None] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def measure(self, value: Tensor, axis: Axis | None, threshold: Tensor | float | None) -> None:
        """Take in one pre-activation and its threshold."""
        value, known = value.detach(), axis is None or axis.fits(value)
        self.preactivations.append((axis.spread(value) if axis is not None and known else value).clone())
        self.thresholds.append(threshold if known else None)


def find_blocks(trace: Trace, layers: Sequence[str]) -> dict[str, tuple[Block, Observation]]:
    """Return for each layer that ran in a traced forward what follows it, and what it computed.

    Args:
        trace: of one forward, in eval mode.
        layers: qualified names of the modules that compute with binarized weights.
    """
    ways = Ways(trace)
    found, ends = dict[str, tuple[Block, Observation]](), dict[str, set[int]]()
    for layer in dict.fromkeys(layers):
        starts = [call.outputs[0] for call in trace.calls if call.module == layer and call.outputs]
        if starts:
            to_neurons = [ways.to_neurons(start) for start in starts]
            block = _judged(ways, layer, starts, to_neurons)
            found[layer] = block, _observed(ways, block, starts, to_neurons)
            ends[layer] = {way[-1].made for way in to_neurons if way}
    for layer, own in ends.items():
        reached = ways.behind(own)
        follow = any(not reached.isdisjoint(other - own) for other in ends.values())
        found[layer] = found[layer][0]._replace(surrogate=follow), found[layer][1]
    return found


def _judged(ways: Ways, layer: str, starts: Sequence[int], to_neurons: Sequence[Way]) -> Block:
    """Return what follows a layer, given the ways of all of its runs."""
    if not any(to_neurons):
        if not all(ways.is_last(start) for start in starts):
            return Block(layer, reason="its outputs are not binary")
        reasons = [_moved_inside(ways, start) or _reordered(ways, layer, start) for start in starts]
        return Block(layer, last=True, reason=next(filter(None, reasons), ""), route=Route())
    if not all(to_neurons):
        return Block(layer, reason="some of its runs have no binary neurons")
    kinds = [_route(ways, start, way) for start, way in zip(starts, to_neurons, strict=True)]
    route, reason = next((kind for kind in kinds if kind[1]), kinds[0])
    if any(kind[0] != route for kind in kinds):
        return Block(layer, reason="its runs reach their neurons in different ways")
    if route.after is None:
        return Block(layer, reason=reason or "its neurons are rearranged before they are binarized")
    return Block(layer, reason=reason, route=route)


def _observed(ways: Ways, block: Block, starts: Sequence[int], to_neurons: Sequence[Way]) -> Observation:
    """Return what was computed in the runs of a layer."""
    seen, values, route = Observation(), ways.trace.values, block.route
    for start, way in zip(starts, to_neurons, strict=True) if route is not None else ():
        assert route is not None
        value = way[route.measured - 1].made if route.measured else start
        threshold = ways.trace.thresholds.get(way[route.measured].made) if route.normed else 0.0
        seen.measure(values[value], route.before, None if value in ways.trace.lost else threshold)
        if way:
            seen.outputs.append(values[way[-1].made].detach())
    return seen


def _route(ways: Ways, start: int, way: Way) -> tuple[Route, str]:
    """Return the route of one run, and what makes its threshold unknown."""
    steps = way[: max((place + 1 for place, step in enumerate(way) if not ways.two_valued(step.made)), default=0)]
    norm = next((place for place, step in enumerate(steps) if step.node.operation == "batch_norm"), None)
    pools = [place + 1 for place, step in enumerate(steps) if "max_pool" in step.node.operation]
    middle = norm if norm is not None else max(pools, default=0)
    numbers = list(_numbers(ways, start, way))
    neurons = 0 if numbers[0] is None else int(numbers[0].max()) + 1
    route = Route(
        tuple(step.node.operation for step in way),
        middle,
        norm is not None,
        axis_of(numbers[middle], neurons),
        axis_of(numbers[-1], neurons),
    )
    wrong = [step for step in steps[:middle] if not _shapes(step)]
    wrong += [step for step in steps[middle + (norm is not None) :] if not _keeps_signs(ways, step)]
    reason = _changed(wrong[0], "before it is binarized") if wrong else _moved_inside(ways, start)
    if not reason and norm is not None and ways.trace.thresholds.get(steps[norm].made) is None:
        reason = f"{steps[norm].node.module or 'its batch norm'} has no running statistics or does not use them"
    if not reason and route.before is None:
        reason = "its neurons are rearranged before they are binarized"
    return route, reason


def _moved_inside(ways: Ways, start: int) -> str:
    """Return what a layer itself does to the result of its linear map, if that changes what a flip moves."""
    _, way = ways.inside(start)
    # what is added is stored: a bias
    wrong = [step for step in way if not _shapes(step) and step.node.operation not in ADDING]
    return _changed(wrong[0], "in the layer") if wrong else ""


def _reordered(ways: Ways, layer: str, start: int) -> str:
    """Return what makes other class scores of a layer's outputs before the network returns them."""
    calls = ways.trace.calls
    own = next((call for call in calls if call.module == layer and start in call.outputs), None)
    if own is None:
        return ""
    around = [call for call in calls if call.nodes[0] <= own.nodes[0] and own.nodes[1] <= call.nodes[1]]
    # the outermost one ended last; what is computed behind it is a loss, say
    scores = [way for value, way in ways.from_(start).items() if value in around[-1].outputs]
    wrong = [[step for step in way if not _keeps_distances(ways, step)] for way in scores]
    if not wrong or not all(wrong):
        return ""
    return f"{wrong[0][0].node.operation.removeprefix('@')} makes other class scores of its outputs"


def _keeps_distances(ways: Ways, step: Step) -> bool:
    """Return whether an operation keeps the order of class scores and the ratios of their distances."""
    if step.node.operation in _SHAPING or "softmax" in step.node.operation:
        return True
    before, after = (ways.trace.values[value].detach() for value in (step.given, step.made))
    known = not {step.given, step.made} & ways.trace.lost and before.shape == after.shape and before.dim() > 1
    if not known or not after.is_floating_point():
        return False
    own, made = (values.double() - values.double().mean(1, keepdim=True) for values in (before, after))
    factor = float((own * made).sum() / own.square().sum().clamp(min=1e-30))
    return factor > 0 and bool(((made - factor * own).abs() <= 1e-4 * made.abs().max()).all())


def _changed(step: Step, where: str) -> str:
    operation = step.node.operation.removeprefix("@")
    what = "something is added to it" if operation in ADDING else f"{operation} changes it"
    return f"{what} {where}, so its threshold is not known"


def _shapes(step: Step) -> bool:
    return step.node.operation in _SHAPING or "max_pool" in step.node.operation


def _keeps_signs(ways: Ways, step: Step) -> bool:
    if step.node.operation in _SHAPING:
        return True
    before, after = (ways.trace.values[value].detach() for value in (step.given, step.made))
    if step.node.operation in ADDING or "pool" in step.node.operation or before.shape != after.shape:
        return False  # whatever it does in this batch
    known = step.node.operation in _SIGN_KEEPING or not {step.given, step.made} & ways.trace.lost
    same = (before.sign() == after.sign()) | before.isnan() | after.isnan()
    return known and bool(same.all())


def _numbers(ways: Ways, start: int, way: Way) -> Iterator[Tensor | None]:
    """Yield the number of each value's neuron in a layer's output, and after each step from there."""
    result, inside = ways.inside(start)
    values = ways.trace.values
    if result is None:  # made by what cannot be seen: channels come first in images, features last elsewhere
        numbers: Tensor | None = numbered(values[start], convolution=values[start].dim() > 3)
    else:
        convolution = ways.operation_of(result).startswith("conv")
        numbers = numbered(values[result], convolution)
        for step in inside:
            numbers = carried(step.node, step.given, step.made, numbers, values)
    yield numbers
    for step in way:
        numbers = carried(step.node, step.given, step.made, numbers, values)
        yield numbers
