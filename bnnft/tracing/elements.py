"""Which elements of parameters a tensor's elements stand for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bnnft.tracing.operations import JOINING, REARRANGING, SAME_ORDER

if TYPE_CHECKING:
    from bnnft.tracing.origins import Origins


def storage_of(tensor: Tensor) -> int:
    """Return what identifies the memory of a tensor for as long as it lives."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError, ValueError):  # sparse and lazy ones have no storage
        return id(tensor)


def covers(tensor: Tensor) -> bool:
    """Return whether a tensor fills its memory."""
    return (
        tensor.layout == torch.strided and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
    )


@dataclass(frozen=True, eq=False)
class Elements:
    """Which elements of a parameter a tensor's elements stand for.

    Attributes:
        name: the parameter; empty where there are several.
        start: flat index of the first element, where the others follow one after the other.
        index: for each element its place among the elements of all parameters, where they do not; -1 for a constant.
    """

    name: str
    start: int = 0
    index: Tensor | None = None

    def __eq__(self, other: object) -> bool:
        """Return whether they are the same elements in the same order."""
        if not isinstance(other, Elements) or (self.name, self.start) != (other.name, other.start):
            return False
        if self.index is None or other.index is None or self.index is other.index:
            return self.index is other.index
        return torch.equal(self.index, other.index)

    def places(self, origins: "Origins", shape: torch.Size, device: torch.device) -> Tensor:
        """Return for each element its place among the elements of all parameters, in the tensor's shape."""
        if self.index is not None:
            return self.index
        first = offset(origins, self.name) + self.start
        return torch.arange(first, first + shape.numel(), device=device).view(shape)

    def owners(self, origins: "Origins") -> list[str]:
        """Return the names of the parameters."""
        if self.index is None:
            return [self.name]
        there, found, first = torch.unique(self.index), [], 0
        for name, parameter in origins.parameters.items():
            low, high = torch.searchsorted(there, torch.tensor([first, first + parameter.numel()]).to(there))
            if high > low:
                found.append(name)
            first += parameter.numel()
        return found

    def positions(self, origins: "Origins", name: str, indices: Tensor, numel: int) -> Tensor:
        """Return where in a tensor of so many elements (flat) the elements of a parameter at flat indices are."""
        size = origins.parameters[name].numel()
        if self.index is None:
            if self.name != name:
                return indices[:0]
            if self.start == 0 and numel == size:
                return indices
            first, last = torch.searchsorted(indices, torch.tensor([self.start, self.start + numel]).to(indices))
            return indices[first:last] - self.start
        chosen = torch.zeros(size, dtype=torch.bool, device=indices.device)
        chosen[indices] = True
        places = self.index.reshape(-1) - offset(origins, name)
        inside = (places >= 0) & (places < size)
        return (inside & chosen[places.clamp(0, size - 1)]).nonzero().squeeze(1)


def offset(origins: "Origins", name: str) -> int:
    """Return the place of a parameter's first element among the elements of all."""
    first = 0
    for other, parameter in origins.parameters.items():
        if other == name:
            return first
        first += parameter.numel()
    raise KeyError(name)


def elements_of(
    origins: "Origins",
    operation: str,
    given: list[Tensor],
    result: Tensor,
    names: frozenset[str],
    companions: Callable[[], Any] | None = None,
    number: int = 0,
) -> Elements | None:
    """Return which elements a result stands for, by those of what it was made of, or ``None``.

    Args:
        origins: of the tensors.
        operation: its name.
        given: tensors that the operation was given.
        result: one of its results.
        names: the parameters that it is made of.
        companions: what the operation makes of the places of the elements, a tensor for each result.
        number: which of the results it is.
    """
    known = {id(tensor): found for tensor in given if (found := origins.elements(tensor)) is not None}
    sources = [(tensor, known[id(tensor)]) for tensor in given if id(tensor) in known]
    if not sources:
        return _of_its_size(origins, result, names)
    tensor, elements = sources[0]
    # what picks elements of something else by a parameter is made of it element by element
    if operation in REARRANGING and companions is not None and (operation in JOINING or tensor is given[0]):
        if len(sources) == 1 and elements.index is None and _consecutive(operation, tensor, result):
            return Elements(elements.name, elements.start + _distance(tensor, result))
        moved = companions()
        if len(moved) > number and moved[number].dtype == torch.int64 and moved[number].shape == result.shape:
            return Elements("", 0, moved[number])
        return None
    same = [(tensor, found) for tensor, found in sources if tensor.shape == result.shape]
    if same:
        first = same[0][1]
        return first if all(found == first for _, found in same) else None
    wide = [(tensor, found) for tensor, found in sources if spreads(tensor.shape, result.shape)]
    if len(wide) == 1 and result.numel() > wide[0][0].numel() > 1:
        tensor, found = wide[0]
        return Elements("", 0, found.places(origins, tensor.shape, tensor.device).expand(result.shape))
    return _of_its_size(origins, result, names)


def _of_its_size(origins: "Origins", result: Tensor, names: frozenset[str]) -> Elements | None:
    """Return the one parameter behind a result of its size: of rotated weights, say."""
    name = next(iter(names)) if len(names) == 1 else None  # products of parameters stand for no element of theirs
    return Elements(name) if name and origins.parameters[name].numel() == result.numel() else None


def _consecutive(operation: str, given: Tensor, result: Tensor) -> bool:
    """Return whether the elements of the result follow one after the other among those given."""
    if operation in SAME_ORDER and result.numel() == given.numel() and result.is_contiguous():
        return operation != "get" or result.shape == given.shape
    is_view = storage_of(result) == storage_of(given)
    return is_view and result.is_contiguous() and given.is_contiguous()


def _distance(given: Tensor, result: Tensor) -> int:
    if storage_of(result) != storage_of(given):
        return 0
    return int(result.storage_offset()) - int(given.storage_offset())


def spreads(shape: torch.Size, over: torch.Size) -> bool:
    """Return whether a tensor of one shape is broadcast to another one.

    Example:
        >>> spreads(torch.Size([3, 1]), torch.Size([2, 3, 4])), spreads(torch.Size([2, 3]), torch.Size([3]))
        (True, False)
    """
    return len(shape) <= len(over) and all(a in (1, b) for a, b in zip(shape[::-1], over[::-1], strict=False))
