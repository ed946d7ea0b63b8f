"""Whether a tensor holds two values: the one answer of the whole package."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_TOLERANCE = 1e-3  # of a distance: scales are products of rounded numbers
_ROUNDINGS = 4  # as many steps of a number format are no difference either
_MOST_ZEROS = 0.01  # share of exact zeros among signs, which torch.sign leaves
_ONE_ZERO = 32  # signs among which one zero may be: it makes no ternary weight of them
_EVIDENCE = 8  # values that must agree before a scale of their own for each line is believed
_CORNER = 8  # entries a dimension of the block that is looked at first


class TwoValues(NamedTuple):
    """The two values of a tensor: ``middle - half`` and ``middle + half``.

    Attributes:
        middle: between them, 0 if they are -c and c; broadcasts against the tensor.
        half: half their distance; broadcasts against the tensor.
        symmetric: they are -c and c.
    """

    middle: Tensor
    half: Tensor
    symmetric: bool


def two_values(values: Tensor, one_is_enough: bool = False) -> TwoValues | None:
    """Return the two values of a tensor, or ``None`` if it has more or fewer.

    They may differ between the lines along one dimension, as with a scale for each neuron: then they must be the same
    along that dimension. A few exact zeros among signs are let pass. Only a small block is looked at where that is
    enough to see that there are more than two.

    Args:
        values: floats of any shape.
        one_is_enough: take a single value other than 0 for one of -c and c.

    Example:
        >>> import torch
        >>> signs = torch.tensor([[1.0, -1.0, 1.0, 1.0, -1.0], [-1.0, -1.0, 1.0, -1.0, 1.0]])
        >>> two_values(signs).half
        tensor([[1.]])
        >>> two_values(signs * torch.tensor([[2.0], [3.0]])).half
        tensor([[2.],
                [3.]])
        >>> two_values((signs + 1) / 2).middle, two_values(torch.rand(2, 5)), two_values(torch.ones(2, 5))
        (tensor([[0.5000]]), None, None)
    """
    values = values.detach()
    if not values.is_floating_point() or values.numel() < 2 or values.dim() == 0:
        return None
    corner = values[tuple(slice(_CORNER) for _ in values.shape)]
    for symmetric in (True, False):
        for line in _lines(values):
            look = _symmetric if symmetric else _apart
            if look(corner, line, True, True) is not None and (found := look(values, line, one_is_enough)) is not None:
                return found
    return None


def differs_at_once(values: Tensor) -> bool:
    """Return whether the first three values along each dimension show that a tensor holds more than two.

    The quick look at a tensor that is likely what it was before.

    Example:
        >>> import torch
        >>> differs_at_once(torch.tensor([0.1, 0.2, 0.3])), differs_at_once(torch.tensor([1.0, -1.0, 1.0]))
        (True, False)
    """
    values = values.detach()
    looked = False
    for dim, size in enumerate(values.shape):
        if size > 2:
            line: list[float] = values[tuple(slice(3) if d == dim else 0 for d in range(values.dim()))].tolist()
            low, middle, high = sorted(line)
            near = _tolerance(values) * max(abs(low), abs(high))
            if min(high - middle, middle - low) <= near or middle == 0:
                return False
            looked = True
    return looked


def sides_of(values: Tensor, found: TwoValues) -> Tensor:
    """Return -1 and +1 for the lower and the higher of two values, 0 for what is neither, as int8."""
    return (values.detach() - found.middle).sign().to(torch.int8)


def same_sides(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of signs agree, up to a change of sign that is the same along some dimension.

    Example:
        >>> import torch
        >>> signs = torch.tensor([[1, -1, 1], [-1, -1, 1]])
        >>> same_sides(signs, signs * torch.tensor([[1], [-1]])), same_sides(signs, signs.abs())
        (True, False)
    """
    product = one * other
    return any(not bool((product.amax(line) > 0).logical_and(product.amin(line) < 0).any()) for line in _lines(product))


def _lines(values: Tensor) -> Iterator[tuple[int, ...]]:
    """Yield the dimensions along which the two values may be the same: all, then each by itself."""
    yield tuple(range(values.dim()))
    if values.dim() > 1:
        yield from ((dim,) for dim, size in enumerate(values.shape) if size > 1)


def _symmetric(values: Tensor, line: tuple[int, ...], one_is_enough: bool, is_corner: bool = False) -> TwoValues | None:
    sizes = values.abs()
    high = sizes.amax(line, keepdim=True)
    if not _agree(values, high, 1, line, one_is_enough) or not bool(((high > 0) & high.isfinite()).all()):
        return None
    both = bool((values.amin() < 0) & (values.amax() > 0))
    if not both and not one_is_enough:
        return None
    off = high - sizes > _tolerance(values) * high
    if bool(off.any()):
        zeros = values == 0
        few = is_corner or (both and int(zeros.sum()) <= max(values.numel() >= _ONE_ZERO, _MOST_ZEROS * values.numel()))
        if not few or not bool((off == zeros).all()):
            return None
    return TwoValues(torch.zeros((), dtype=values.dtype, device=values.device), high, True)


def _apart(values: Tensor, line: tuple[int, ...], one_is_enough: bool, is_corner: bool = False) -> TwoValues | None:
    low, high = values.amin(line, keepdim=True), values.amax(line, keepdim=True)
    distance = high - low
    if not _agree(values, high, 2, line, one_is_enough) or not bool(distance.isfinite().all()):
        return None
    if not bool((distance > 0).float().mean() > (0.0 if one_is_enough else 0.5)):
        return None
    near = torch.minimum(values - low, high - values)
    if not bool((near <= _tolerance(values) * distance).all()):
        return None
    return TwoValues((low + high) / 2, distance / 2, False)


def _tolerance(values: Tensor) -> float:
    """Return which share of a distance is no difference in this number format."""
    return max(_TOLERANCE, _ROUNDINGS * torch.finfo(values.dtype).eps)


def _agree(values: Tensor, lines: Tensor, free: int, line: tuple[int, ...], small: bool) -> bool:
    """Return whether enough values would agree with others of their line for it to be no chance."""
    whole = len(line) == values.dim()
    return small or values.numel() - free * lines.numel() >= (1 if whole else _EVIDENCE)
