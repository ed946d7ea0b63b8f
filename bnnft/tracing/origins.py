"""What tensors are made of, by the memory that they lie in."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnnft.tracing.elements import Elements, offset, spreads, storage_of


class Origin(NamedTuple):
    """What a tensor is made of.

    Attributes:
        parameters: names of the parameters behind it.
        floats: those whose values came to it without passing a mark.
        marks: what :meth:`bnnft.tracing.provenance.Provenance.made` left on the tensors behind it.
        unsure: it was made of nothing, of random numbers, say: of the batch, unless it meets a parameter of its shape.
    """

    parameters: frozenset[str] = frozenset()
    floats: frozenset[str] = frozenset()
    marks: frozenset[Any] = frozenset()
    unsure: bool = False


CONSTANT = Origin()
MAYBE = Origin(unsure=True)


def merged(origins: Iterable[Origin | None]) -> Origin:
    """Return what a tensor is made of that is made of several others."""
    known = [origin for origin in origins if origin is not None]
    return Origin(
        frozenset().union(*(origin.parameters for origin in known)),
        frozenset().union(*(origin.floats for origin in known)),
        frozenset().union(*(origin.marks for origin in known)),
        any(origin.unsure for origin in known),
    )


class Origins:
    """The origins of all tensors that are made of parameters, buffers and constants alone.

    Args:
        model: whose parameters are known by their qualified names, a tied one by its first.

    Attributes:
        parameters: by name.
        written: names of the parameters that an operation wrote to.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.parameters = {name: each for name, each in model.named_parameters() if not is_lazy(each)}
        self.written: set[str] = set()
        self._origins: dict[int, tuple[Origin, Tensor]] = {}  # the tensor keeps its memory from being used again
        self._elements: dict[int, dict[Any, Elements]] = {}  # by memory, then by layout
        self._owners: dict[int, str] = {}  # memory of parameters
        self._foreign: set[int] = set()  # identities of parameters that were looked for in vain

    def clear(self) -> None:
        """Forget all tensors."""
        for known in (self._origins, self._elements, self._owners, self._foreign, self.written):
            known.clear()

    def look_again(self) -> None:
        """Look once more for parameters that were not the model's: what FSDP2 gathers is put in their place later."""
        self._foreign.clear()

    def register(self, constants: Iterable[Tensor] = ()) -> None:
        """Take note of the parameters, of all other tensors that the model's modules hold now, and of constants."""
        for name, parameter in self.parameters.items():
            self.own(name, parameter)
        for module in self._model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                for tensor in _held(module):
                    if storage_of(tensor) not in self._owners:
                        self.keep(tensor, CONSTANT)
        for constant in constants:
            self.keep(constant, CONSTANT)

    def own(self, name: str, parameter: Tensor) -> None:
        """Take note of a parameter."""
        self._owners[storage_of(parameter)] = name
        self.keep(parameter, Origin(frozenset([name]), frozenset([name])), Elements(name))
        for value in vars(parameter).values():
            if isinstance(value, Tensor) and value is not parameter.grad:
                self.keep(value, CONSTANT)  # a latent that hangs on its parameter, say

    def moved(self, parameter: Tensor, memory: int) -> None:
        """Take note that a tensor lies in other memory now than before: ``parameter.data = values``."""
        if storage_of(parameter) == memory:
            return
        self._origins.pop(memory, None)
        if (owner := self._owners.pop(memory, None)) is not None:
            self.own(owner, parameter)
            self.written.add(owner)

    def keep(self, tensor: Tensor, origin: Origin, elements: Elements | None = None) -> None:
        """Take note of what a new tensor is made of, and of which elements."""
        self._elements.pop(storage_of(tensor), None)
        self.change(tensor, origin)
        self.view(tensor, elements)

    def change(self, tensor: Tensor, origin: Origin) -> None:
        """Take note of what a tensor is made of whose elements stand for the same as before."""
        self._origins[storage_of(tensor)] = origin, tensor

    def view(self, tensor: Tensor, elements: Elements | None) -> None:
        """Take note of which elements a tensor stands for that lies in memory that is known."""
        if elements is not None:
            self._elements.setdefault(storage_of(tensor), {})[_layout(tensor)] = elements

    def keep_unsure(self, tensors: Iterable[Tensor]) -> None:
        """Take note of what was made of nothing, if it could be combined with a parameter element by element."""
        for tensor in tensors:
            if any(spreads(tensor.shape, parameter.shape) for parameter in self.parameters.values()):
                self.keep(tensor, MAYBE if tensor.numel() > 1 else CONSTANT)

    def forget(self, tensor: Tensor) -> None:
        """Take note that a tensor is of the batch now."""
        memory = storage_of(tensor)
        self._origins.pop(memory, None)
        self._elements.pop(memory, None)

    def of(self, tensor: Tensor) -> Origin | None:
        """Return what a tensor is made of, ``None`` if it is of the batch."""
        if isinstance(tensor, nn.Parameter) and self.owner(tensor) is None and not is_lazy(tensor):
            self._look_for(tensor)
        found = self._origins.get(storage_of(tensor))
        return None if found is None else found[0]

    def _look_for(self, parameter: nn.Parameter) -> None:
        """Take note of a parameter that was not there at first: of a lazy layer, or gathered of shards."""
        if id(parameter) not in self._foreign:
            for name, each in self._model.named_parameters():
                if each is parameter:
                    self.parameters[name] = parameter
                    self.own(name, parameter)
                    return
            self._foreign.add(id(parameter))

    def elements(self, tensor: Tensor) -> Elements | None:
        """Return which elements of parameters a tensor's elements stand for, if it is known."""
        return self._elements.get(storage_of(tensor), {}).get(_layout(tensor))

    def at(self, tensor: Tensor, values: Tensor, elements: Elements | None) -> Tensor | None:
        """Return values of elements of parameters where these elements are in a tensor, if it is known.

        Args:
            tensor: made of parameters.
            values: int8, of the elements; others have 0.
            elements: which they are.
        """
        there = self.elements(tensor)
        if there is None or elements is None:
            return None
        if there == elements and tensor.shape == values.shape:
            return values
        return self._spread(values, elements, 0)[there.places(self, tensor.shape, tensor.device)]

    def whole(self, name: str, values: Tensor, elements: Elements) -> Tensor:
        """Return values of elements in the shape of a parameter, 1 where there are none of its elements."""
        parameter = self.parameters[name]
        if elements == Elements(name) and values.numel() == parameter.numel():
            return values.reshape(parameter.shape)
        first = offset(self, name)
        return self._spread(values, elements, 1)[first : first + parameter.numel()].view(parameter.shape)

    def _spread(self, values: Tensor, elements: Elements, filling: int) -> Tensor:
        """Return values of elements at their places among the elements of all parameters; the last is a constant's."""
        size = sum(parameter.numel() for parameter in self.parameters.values())
        spread = torch.full((size + 1,), filling, dtype=values.dtype, device=values.device)
        spread[elements.places(self, values.shape, values.device).reshape(-1)] = values.reshape(-1)
        return spread

    def owner(self, tensor: Tensor) -> str | None:
        """Return the name of the parameter that a tensor is, or is a view of."""
        return self._owners.get(storage_of(tensor))


def _layout(tensor: Tensor) -> Any:
    if tensor.layout != torch.strided:
        return id(tensor)
    return tensor.storage_offset(), tensor.shape, tensor.stride()


def _held(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors among the attributes of a module, and in lists and dicts there."""
    for value in vars(module).values():  # among them the dict of its buffers
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        yield from (each for each in inside if isinstance(each, Tensor) and not is_lazy(each))
