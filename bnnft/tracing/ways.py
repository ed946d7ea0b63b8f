"""Follow the values of a trace: what was made of which, on which way, and which are two-valued."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from bnnft.tracing.trace import READING, Node, Trace
from bnnft.tracing.tracking import LINEAR_MAPS, is_alive

ADDING = {"add", "iadd", "radd", "sub", "isub", "rsub", "addcmul", "addcdiv"}
_MOST_ZEROS = 0.2  # share of them among signs: of sums of 16 signs one in five is 0
_TOLERANCE = 1e-3  # of magnitudes that count as equal: x + (sign(x) - x) is rounded
_SAMPLE = 1024  # values to look at first: most tensors are seen to be no signs by few


class Step(NamedTuple):
    """From one value to the next by an operation."""

    node: Node
    given: int
    made: int


Way = tuple[Step, ...]


class Ways:
    """Answers where the values of a trace go and come from.

    Args:
        trace: of one forward.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._consumers: dict[int, list[Node]] = {}
        self._makers: dict[int, Node] = {}
        stored = {id(tensor) for tensor in (*trace.model.parameters(), *trace.model.buffers())}
        self._stored = {number for number, value in enumerate(trace.values) if id(value) in stored}
        for node in trace.nodes:
            for value in node.outputs:
                self._makers.setdefault(value, node)  # a module is noted after what it did itself
            for value in node.inputs:
                self._consumers.setdefault(value, []).append(node)
            if self._stored.issuperset(node.inputs):
                self._stored.update(node.outputs)
        self._read = {value for name, inputs in trace.read if name in READING for value in inputs}
        self._looked: dict[int, tuple[bool, bool]] = {}  # every way asks again, and each look reads the whole tensor

    def to_neurons(self, start: int) -> Way:
        """Return the shortest way from a layer's output to its binary neurons; it is empty where there are none."""
        ways = self.from_(start)
        ends = [value for value, way in ways.items() if way and self.signs(value) and self._zeros_are_ties(way)]
        # class scores can be of one size by themselves, two of them with opposite signs, say
        if not ends or (self.is_last(start) and self.signs(start)):
            return ()
        shape = self.trace.values[ends[0]].shape
        same = sorted(value for value in ends if self.trace.values[value].shape == shape)
        # a straight-through estimator is several operations, and a scale may follow the sign: the neurons are the last
        # value by way of which all linear maps behind are reached, and all that is read into Python
        used = not self.is_last(ends[0])
        end = max((v for v in same if not self._uses_behind(ends[0], avoiding=v)), default=ends[0])
        end = end if used else ends[0]
        # a mask on signs makes them ternary
        masked = [v for v in self._made_of(end) if self.signs(v) and not self._zeros_are_ties(ways[v])]
        return () if masked else ways[end]

    def is_last(self, start: int) -> bool:
        """Return whether no linear map follows a value."""
        return not any(kind == "map" for kind, _ in self._uses_behind(start))

    def inside(self, start: int) -> tuple[int | None, Way]:
        """Return the result of the linear map that an output was made of, and the way from there.

        Where it was made of several values of the batch, or by what cannot be seen, there is no such map.
        """
        way: Way = ()
        node = self._makers.get(start)
        while node is not None and not is_map(node):
            given = [value for value in node.inputs if value not in self._stored]
            if len(set(given)) != 1:
                return None, way
            way = (Step(node, given[0], way[0].given if way else start), *way)
            node = self._makers.get(given[0])
        return (way[0].given if way else start) if node is not None else None, way

    def operation_of(self, value: int) -> str:
        """Return the name of the operation that made a value."""
        return self._makers[value].operation

    def behind(self, values: Iterable[int]) -> set[int]:
        """Return some values and all that were made of them."""
        reached = set(values)
        for node in self.trace.nodes:
            if not reached.isdisjoint(node.inputs):
                reached.update(node.outputs)
        return reached

    def signs(self, value: int) -> bool:
        """Return whether a value is one of two numbers of equal size, or 0, for every sample and neuron."""
        return self._look(value)[1]

    def two_valued(self, value: int) -> bool:
        """Return whether a value is one of two numbers for every sample and neuron."""
        return self._look(value)[0]

    def _zeros_are_ties(self, way: Way) -> bool:
        """Return whether signs are 0 only where what they were made of is 0, as torch.sign makes them."""
        signs = self.trace.values[way[-1].made]
        zeros = signs == 0
        source = next((step.given for step in reversed(way) if not self.signs(step.given)), None)
        if source is None or self.trace.values[source].shape != signs.shape:
            return float(zeros.float().mean()) <= _MOST_ZEROS
        return bool((self.trace.values[source][zeros] == 0).all())

    def _made_of(self, value: int) -> list[int]:
        """Return what was made of a value by one operation, but for linear maps and sums with others."""
        nodes = [node for node in self._consumers.get(value, ()) if not is_map(node) and node.operation not in ADDING]
        return [output for node in nodes for output in node.outputs]

    def from_(self, start: int) -> dict[int, Way]:
        """Return all values up to the next linear maps that were made of one, nearest first, with the way to each."""
        ways: dict[int, Way] = {start: ()}
        reached = [start]
        for value in reached:  # grows while it is read
            for node in self._consumers.get(value, ()):
                for output in () if is_map(node) else node.outputs:
                    if output not in ways:
                        ways[output] = (*ways[value], Step(node, value, output))
                        reached.append(output)
        return ways

    def _uses_behind(self, start: int, avoiding: int | None = None) -> set[tuple[str, int]]:
        """Return what is reached from a value without passing another one: results of linear maps, and what is read."""
        found, reached = set[tuple[str, int]](), {start} - {avoiding}
        todo = list(reached)
        for value in todo:
            found.update({("read", value)} if value in self._read else ())
            for node in self._consumers.get(value, ()):
                if is_map(node):
                    found.update(("map", output) for output in node.outputs)
                else:
                    new = [output for output in node.outputs if output not in reached and output != avoiding]
                    reached.update(new)
                    todo += new
        return found

    def _look(self, value: int) -> tuple[bool, bool]:
        if value not in self._looked:
            self._looked[value] = self._two_valued(value)
        return self._looked[value]

    def _two_valued(self, value: int) -> tuple[bool, bool]:
        tensor = self.trace.values[value].detach()
        known = value not in self.trace.lost and is_alive(tensor)
        if tensor.dim() < 2 or tensor.numel() == 0 or not known or tensor.is_complex():
            return False, False
        for part in (tensor.flatten()[:_SAMPLE], tensor) if tensor.numel() > _SAMPLE else (tensor,):
            two = bool(((part == part.max()) | (part == part.min())).all())
            signs = tensor.is_floating_point() and _are_signs(part, whole=part is tensor)
            if not two and not signs:
                return False, False
        return two or signs, signs


def _are_signs(tensor: Tensor, whole: bool) -> bool:
    sizes, zero = tensor.abs(), tensor == 0
    high = sizes.max()
    if not whole:
        return bool(((high - sizes <= _TOLERANCE * high) | zero).all())
    equal = bool(high > 0) and bool(((high - sizes <= _TOLERANCE * high) | zero).all())
    return equal and (not bool(zero.any()) or (bool(tensor.min() < 0) and bool(tensor.max() > 0)))


def is_map(node: Node) -> bool:
    """Return whether a node multiplies by weights."""
    return node.operation.startswith(LINEAR_MAPS)
