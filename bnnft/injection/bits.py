"""What is known of tensors that hold bits: how they are made, and how they are used."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from bnnft.tracing.binary import TwoValues, sides_of
from bnnft.tracing.elements import Elements
from bnnft.tracing.origins import Origins
from bnnft.tracing.sharding import whole

# operations whose weights have their neurons in rows
_ROWS = ("linear", "conv", "bilinear", "multi_head_attention_forward", "lstm", "gru", "rnn")


class Mark(NamedTuple):
    """Where a tensor of two values is made: in which module, by which operation, in which shape, of what."""

    module: str
    operation: str
    shape: tuple[int, ...]
    owners: tuple[str, ...]


def owners_of(marks: Iterable[Mark]) -> set[str]:
    """Return the parameters behind some marks."""
    return {owner for mark in marks for owner in mark.owners}


class Bits(NamedTuple):
    """A tensor of two values that was made of parameters.

    Attributes:
        symmetric: the values are -c and c.
        feeds: the batch is combined with what is made of it; ``None`` as long as that is not known.
        sides: int8, which of its two values each element has, of the last one that was watched.
        elements: of parameters, which it stands for.
    """

    symmetric: bool
    feeds: bool | None = None
    sides: Tensor | None = None
    elements: Elements | None = None


class Use(NamedTuple):
    """How the batch is combined with the bits of a parameter; of several the first one."""

    layer: str
    fan_in: int
    scale: Tensor | None
    stored: bool
    like_latent: bool
    zero: int
    written: bool  # just before, as by code that binarizes a parameter in place


def few_values(operand: Tensor, most: int) -> bool:
    """Return whether the lines of an operand hold so few values that it can be a sum of binary ones."""
    lines = operand.detach().reshape(len(operand), -1)[:4]
    for line in lines:
        values = (line / line.abs().max().clamp(min=torch.finfo(line.dtype).tiny) * 1e3).round()
        if values.numel() <= most or values.unique().numel() > most:
            return False
    return True


def form_of(operand: Tensor, operation: str, first: bool, found: TwoValues | None) -> tuple[int, Tensor | None]:
    """Return the number of weights of an output neuron, and half the distance of its two values where that is not 1.

    Args:
        operand: that an operation combines with the batch.
        operation: its name.
        first: the operand is its first one.
        found: the two values of the operand.
    """
    neurons = 0 if operation.startswith(_ROWS) else (-2 if first and operand.dim() > 1 else -1)
    count = operand.shape[neurons] if operand.dim() else 1
    scale = None
    if found is not None and operand.dim() > 1:
        half = found.half.expand_as(operand).movedim(neurons, 0).reshape(count, -1).amax(1)
        scale = None if bool((half == 1).all()) else half
    return operand.numel() // max(count, 1), scale


def compared_with_latent(
    origins: Origins, owner: str, operand: Tensor, found: TwoValues | None, signs: Tensor
) -> tuple[bool, int]:
    """Return whether an operand has the signs of its latent weight, and what is made of a latent of 0."""
    parameter = origins.parameters[owner]
    if found is None or (there := origins.at(operand, signs, Elements(owner))) is None:
        return False, 1
    sides, shape = sides_of(operand, found), whole(parameter).shape
    zeros = sides[there == 0]
    hidden = any(isinstance(value, Tensor) and value.shape == shape for value in vars(parameter).values())
    return not hidden and bool((sides * there >= 0).all()), int(zeros[0]) if len(zeros) else 1


def by_signs(operand: Tensor) -> TwoValues:
    """Return the two values of each element of an operand that differs from the other one by its sign."""
    operand = operand.detach()
    return TwoValues(operand.new_zeros(()), operand.abs(), True)


def has_rank_one(values: Tensor) -> bool:
    """Return whether a matrix (of more dimensions, the rows of the first) is a column times a row.

    Example:
        >>> column, row = torch.rand(4, 1) + 1, torch.rand(1, 6) + 1
        >>> has_rank_one(column * row), has_rank_one(torch.rand(4, 6))
        (True, False)
    """
    rows = values.reshape(len(values), -1) if values.dim() else values.reshape(1, 1)
    least = torch.finfo(rows.dtype).tiny
    column, row = rows.amax(1, keepdim=True), rows.amax(0, keepdim=True)
    product = column * row / rows.amax().clamp(min=least)
    return bool(((product - rows).abs() <= 1e-3 * product).all())


def is_masked(values: Tensor) -> bool:
    """Return whether the rows of a matrix hold one positive value each, and zeros.

    Example:
        >>> is_masked(torch.ones(4, 6).tril()), is_masked(torch.rand(4, 6).tril())
        (True, False)
    """
    rows = values.reshape(len(values), -1) if values.dim() else values.reshape(1, 1)
    high = rows.amax(1, keepdim=True)
    return bool(((rows == 0) | (high - rows <= 1e-3 * high)).all())
