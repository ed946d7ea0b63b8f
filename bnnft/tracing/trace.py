"""Record one forward: which operation made which value from which, and which module returned it."""

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from bnnft.tracing.thresholds import thresholds_of_call
from bnnft.tracing.tracking import Looking, identity, is_alive, memory, operation_name, tensors

# operations that take numbers out of tensors, where they return none
READING = {"item", "tolist", "numpy", "bool", "int", "float", "index", "array", "is_nonzero", "equal", "allclose"}
_WRITING = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
_WRITING |= {"__ilshift__", "__irshift__", "__setitem__"}
_KEEPING = {"requires_grad_", "detach_", "share_memory_", "rename_", "retain_grad_"}  # write no values


class Node(NamedTuple):
    """One operation.

    Attributes:
        operation: its name, without underscores; of a module whose inside cannot be seen ``@`` and its qualified name.
        module: qualified name of the innermost module that it ran in.
        inputs: numbers of the values that it was given, in the order of the tensors in its arguments.
        outputs: numbers of the values that it made.
        results: numbers of the values that it returned, which may be among the inputs.
        written: numbers of values before and after the operation wrote to their memory.
        call: function and arguments; ``None`` for a module whose inside cannot be seen.
    """

    operation: str
    module: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    results: tuple[int, ...] = ()
    written: tuple[tuple[int, int], ...] = ()
    call: tuple[Any, Any, Any] | None = None

    def run(self, value: Callable[[int], Tensor]) -> dict[int, Tensor]:
        """Run the operation again on other values.

        Args:
            value: returns the tensor to put in the place of a value, by its number.

        Returns:
            What it makes, by the numbers of the values that it made.
        """
        assert self.call is not None
        func, args, kwargs = self.call
        leaves, tree = tree_flatten((args, kwargs))
        numbers = iter(self.inputs)
        given: dict[int, Tensor] = {}
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                number = next(numbers)
                leaves[place] = given.setdefault(number, value(number))
        args, kwargs = tree_unflatten(leaves, tree)
        made = dict(zip(self.results, tensors(func(*args, **kwargs)), strict=True))
        return made | {after: given.get(before, value(before)) for before, after in self.written}


class Call(NamedTuple):
    """One run of a module.

    Attributes:
        module: its qualified name.
        outputs: numbers of the values that it returned.
        nodes: numbers of the first node in it and of the first one after it.
    """

    module: str
    outputs: tuple[int, ...]
    nodes: tuple[int, int]


class Trace(Looking):
    """Records which operation made which value from which, while active; changes nothing of the run.

    A value is what a tensor held between two writes; it is copied before it is overwritten. The trace keeps a reference
    to every intermediate result, so use it for one batch and drop it.

    Args:
        model: the module that is to run.

    Attributes:
        values: the values by their numbers.
        nodes: operations in the order in which they ran.
        calls: runs of modules in the order in which they ended.
        thresholds: of the neurons behind each call of ``batch_norm``, by the number of its result.
        lost: numbers of values that were overwritten by an operation that did not look like one that writes.
        read: names of operations that returned no tensor, each with its inputs.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.values: list[Tensor] = []
        self.nodes: list[Node] = []
        self.calls: list[Call] = []
        self.thresholds: dict[int, Tensor | None] = {}
        self.lost: set[int] = set()
        self.read: list[tuple[str, tuple[int, ...]]] = []
        self._numbers: dict[Any, int] = {}  # identity of a tensor to the value it holds
        self._in_memory: dict[Any, list[int]] = {}  # values that lie in a piece of memory
        self._starts: list[tuple[tuple[int, ...], int]] = []  # of each running module: its inputs, nodes before it
        self._kept: list[Tensor] = []  # so that no later tensor has the identity of one that was overwritten

    def number(self, tensor: Tensor) -> int:
        """Return the number of the value that a tensor holds now."""
        key = identity(tensor)
        if key not in self._numbers:
            self._numbers[key] = len(self.values)
            self._in_memory.setdefault(memory(tensor), []).append(len(self.values))
            self.values.append(tensor)
        return self._numbers[key]

    def before(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Take note of what an operation is given, and copy what it is going to overwrite."""
        inputs = tensors((args, kwargs))
        numbers = tuple(map(self.number, inputs))
        targets = overwritten(func, args, kwargs)
        aside = [pair for target in targets for pair in self._set_aside(target)]
        versions = [None if tensor.is_inference() else tensor._version for tensor in inputs]
        # what is kept are the tensors themselves: lists of them may change after the call
        call = func, *tree_map_only(Tensor, lambda tensor: tensor, (args, kwargs))
        return call, inputs, numbers, versions, targets, aside

    def after(self, noted: Any, result: Any) -> Any:
        """Record the operation."""
        call, inputs, numbers, versions, targets, aside = noted
        for tensor, version in zip(inputs, versions, strict=True):
            if version is not None and tensor._version != version and not any(tensor is t for t in targets):
                surprising = self._set_aside(tensor)
                self.lost.update(number for number, _ in surprising)
                aside += surprising
        written = tuple((number, self.number(tensor)) for number, tensor in aside)
        results = tuple(map(self.number, tensors(result)))
        if inputs and not results and not written:
            self.read.append((operation_name(call[0]), numbers))
        if operation_name(call[0]) == "batch_norm" and results:
            self.thresholds[results[0]] = thresholds_of_call(*call)
        self._record(operation_name(call[0]), numbers, results, written, call)
        return result

    def _set_aside(self, target: Tensor) -> list[tuple[int, Tensor]]:
        """Copy the values in the memory of a tensor that is written to; return their numbers and tensors."""
        numbers = self._in_memory.pop(memory(target), [])
        tensors_there = [(number, self.values[number]) for number in numbers]
        for number, tensor in tensors_there:
            self._numbers.pop(identity(tensor), None)
            self._kept.append(tensor)
            if is_alive(tensor):
                self.values[number] = tensor.detach().clone()
            else:
                self.lost.add(number)
        return tensors_there

    def _record(self, operation: str, inputs: Any, results: Any, written: Any = (), call: Any = None) -> None:
        made = tuple(dict.fromkeys([*results, *(after for _, after in written)]))
        made = tuple(value for value in made if value not in inputs)
        if inputs and made:
            module = self.within[-1] if self.within else ""
            self.nodes.append(Node(operation, module, inputs, made, results, written, call))

    def entered(self, name: str, inputs: tuple[Tensor, ...]) -> None:
        """Take note of what a module is given."""
        self._starts.append((tuple(map(self.number, inputs)), len(self.nodes)))

    def left(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        """Take note of what a module returns."""
        given, before = self._starts.pop()
        made = tuple(map(self.number, outputs))
        reached = set(given)
        for node in self.nodes[before:]:
            if not reached.isdisjoint(node.inputs):
                reached.update(node.outputs)
        if reached.isdisjoint(made):  # by what is no torch function: numpy or another library, say
            samples = {tensor.shape[:1] for tensor in inputs}  # what has none, a scale, say, was not made of these
            self._record(f"@{name}", given, tuple(self.number(t) for t in outputs if t.shape[:1] in samples))
        self.calls.append(Call(name, made, (before, len(self.nodes))))


def overwritten(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that an operation is going to write to."""
    name = getattr(func, "__name__", "")
    out = list(tensors(kwargs.get("out")))
    in_place = name in _WRITING or (name.endswith("_") and not name.endswith("__") and name not in _KEEPING)
    place = _place_of_inplace(func)
    if place is not None:
        in_place = bool(kwargs.get("inplace", args[place] if len(args) > place else False))
    return out + (list(tensors((args, kwargs))[:1]) if in_place else [])


@cache
def _place_of_inplace(func: Any) -> int | None:
    """Return the position of a function's argument ``inplace``, if it has one."""
    try:
        return list(signature(func).parameters).index("inplace")
    except (ValueError, TypeError):
        return None
