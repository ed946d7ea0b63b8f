"""Which elements of parameters a tensor's elements stand for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bnnft.tracing.origins import Origins

# operations that move values and change none
REARRANGING = {"t", "transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "adjoint", "get"}
REARRANGING |= {"view", "reshape", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "contiguous", "clone"}
REARRANGING |= {"chunk", "split", "split_with_sizes", "tensor_split", "unbind", "narrow", "select", "getitem", "iter"}
REARRANGING |= {"hsplit", "vsplit", "dsplit", "diagonal", "as_strided", "detach", "alias", "expand", "roll", "flip"}
REARRANGING |= {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "tile", "repeat", "rot90"}
REARRANGING |= {"index_select", "gather", "take", "repeat_interleave", "broadcast_to", "unfold", "requires_grad"}
REARRANGING |= {"view_as", "reshape_as", "expand_as"}
_SAME_ORDER = {"view", "reshape", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "contiguous", "clone", "get"}
_SAME_ORDER |= {"detach", "alias", "requires_grad", "view_as", "reshape_as"}


def storage_of(tensor: Tensor) -> int:
    """Return what identifies the memory of a tensor for as long as it lives."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError, ValueError):  # sparse and lazy ones have no storage
        return id(tensor)


@dataclass(frozen=True)
class Elements:
    """Which elements of a parameter a tensor's elements stand for.

    Attributes:
        name: the parameter; empty where there are several.
        start: flat index of the first element, where the others follow one after the other.
        index: for each element its place among the elements of all parameters, where they do not.
    """

    name: str
    start: int = 0
    index: Tensor | None = None

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
        low, high = self.index.min(), self.index.max()
        found, first = [], 0
        for name, parameter in origins.parameters.items():
            if low < first + parameter.numel() and high >= first:
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
    if operation in REARRANGING and companions is not None:
        tensor, elements = sources[0]
        if len(sources) == 1 and elements.index is None and _consecutive(operation, tensor, result):
            return Elements(elements.name, elements.start + _distance(tensor, result))
        moved = companions()
        return Elements("", 0, moved[number]) if len(moved) > number and moved[number].shape == result.shape else None
    same = [(tensor, found) for tensor, found in sources if tensor.shape == result.shape]
    if same:
        first = same[0][1]
        return first if all(_equal(found, first) for _, found in same) else None
    wide = [(tensor, found) for tensor, found in sources if _broadcasts(tensor, result)]
    if len(wide) == 1 and result.numel() > wide[0][0].numel() > 1:
        tensor, found = wide[0]
        return Elements("", 0, found.places(origins, tensor.shape, tensor.device).expand(result.shape))
    return _of_its_size(origins, result, names)


def _of_its_size(origins: "Origins", result: Tensor, names: frozenset[str]) -> Elements | None:
    """Return the one parameter of the result's size behind it: of rotated weights, say."""
    same = [name for name in names if origins.parameters[name].numel() == result.numel()]
    return Elements(same[0]) if len(same) == 1 else None


def _consecutive(operation: str, given: Tensor, result: Tensor) -> bool:
    """Return whether the elements of the result follow one after the other among those given."""
    if operation in _SAME_ORDER and result.numel() == given.numel() and result.is_contiguous():
        return operation != "get" or result.shape == given.shape
    is_view = storage_of(result) == storage_of(given)
    return is_view and result.is_contiguous() and given.is_contiguous()


def _distance(given: Tensor, result: Tensor) -> int:
    if storage_of(result) != storage_of(given):
        return 0
    return result.storage_offset() - given.storage_offset()


def _broadcasts(tensor: Tensor, result: Tensor) -> bool:
    shape = tensor.shape
    return len(shape) <= result.dim() and all(
        a in (1, b) for a, b in zip(shape[::-1], result.shape[::-1], strict=False)
    )


def _equal(one: Elements, other: Elements) -> bool:
    if one.index is None or other.index is None:
        return one.index is other.index and (one.name, one.start) == (other.name, other.start)
    return one.index is other.index or torch.equal(one.index, other.index)
