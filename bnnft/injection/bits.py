"""What is known of tensors that hold bits: how they are made, and how they are used."""

from typing import NamedTuple

import torch
from torch import Tensor

from bnnft.tracing.elements import Elements


class Mark(NamedTuple):
    """Where a tensor of two values is made: in which module, by which operation, in which shape, of what."""

    module: str
    operation: str
    shape: tuple[int, ...]
    owners: tuple[str, ...]


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
