"""Record one forward: which operation made which value from which, and which module returned it."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from bnnft.tracing.tracking import Place, Tracking, tensors


class Node(NamedTuple):
    """One operation.

    Attributes:
        operation: its name, without underscores.
        place: where it ran.
        inputs: numbers of the values that it was given.
        outputs: numbers of the values that it made.
    """

    operation: str
    place: Place
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Call(NamedTuple):
    """One run of a module.

    Attributes:
        module: its qualified name.
        number: of the call among all of this module.
        outputs: numbers of the values that it returned.
    """

    module: str
    number: int
    outputs: tuple[int, ...]


class Trace(Tracking):
    """Records which operation made which value from which, while active; changes nothing of the run.

    A value is what a tensor held between two writes. The trace keeps a reference to every intermediate result, so use
    it for one batch and drop it.

    Args:
        model: the module that is to run.

    Attributes:
        values: the tensors by the numbers of their values.
        nodes: operations in the order in which they ran.
        calls: runs of modules in the order in which they ended.
        runs: how often each module ran.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.values: list[Tensor] = []
        self.nodes: list[Node] = []
        self.calls: list[Call] = []
        self.runs: dict[str, int] = {}
        self._current: dict[int, int] = {}  # identity of a tensor to the value it holds
        self._starts: list[tuple[tuple[int, ...], int]] = []  # of each running module: its inputs, nodes before it

    def holds(self, value: int) -> bool:
        """Tell whether the tensor of a value still holds it: nothing was written to it since."""
        return self._current.get(id(self.values[value])) == value

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
            self._current[id(tensor)] = len(self.values)
            self.values.append(tensor)
        return self._current[id(tensor)]

    def _record(self, operation: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> None:
        made = tuple(value for value in outputs if value not in inputs)
        if inputs and made:
            self.nodes.append(Node(operation, self.place, inputs, made))

    def entered(self, name: str, inputs: tuple[Tensor, ...]) -> None:
        """Take note of what a module is given."""
        self._starts.append((tuple(map(self._number, inputs)), len(self.nodes)))

    def left(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        """Take note of what a module returns."""
        given, before = self._starts.pop()
        made = tuple(map(self._number, outputs))
        reached = set(given)
        for node in self.nodes[before:]:
            if not reached.isdisjoint(node.inputs):
                reached.update(node.outputs)
        if reached.isdisjoint(made):  # by what is no torch function: an autograd.Function, say
            samples = {tensor.shape[:1] for tensor in inputs}  # what has none, a scale, say, was not made of these
            of_samples = [tensor for tensor in outputs if tensor.shape[:1] in samples]
            self._record(type(module).__name__, given, tuple(map(self._number, of_samples)))
        self.calls.append(Call(name, self.runs.get(name, 0), made))
        self.runs[name] = self.runs.get(name, 0) + 1
