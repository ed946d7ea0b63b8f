"""The sign bits of a float tensor, where they lie in its memory: read them, and flip them in place."""

import torch
from torch import Tensor

from bnnft.tracing.sharding import local_part

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def memory_of(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return a float tensor's memory as one row of integers, and where in it the flat indices lie.

    Args:
        values: any float type and memory layout, without internal overlap.
        indices: flat, in the order of rows, of any shape.
    """
    memory, places = values.detach(), indices  # not .data: autograd must see that the tensor was written
    if memory.is_contiguous():
        memory = memory.view(-1)
    else:
        places, rest, extent = torch.zeros_like(indices), indices, 1
        for size, stride in zip(reversed(memory.shape), reversed(memory.stride()), strict=True):
            places += rest.remainder(size) * stride
            rest, extent = rest.div(size, rounding_mode="floor"), extent + (size - 1) * stride
        memory = memory.as_strided((extent,), (1,))
    return memory.view(_INTEGERS[memory.element_size()]), places


def raw_values(values: Tensor, indices: Tensor) -> Tensor:
    """Return the floats at flat indices as integers; those of floats with a set sign bit are negative."""
    memory, places = memory_of(values, indices)
    return memory.index_select(0, places)


def flip_signs(values: Tensor, indices: Tensor) -> None:
    """Flip the sign bits of a float tensor in place, at distinct flat indices; twice is the identity.

    Works on every float type and memory layout, without a copy of the tensor; of a distributed tensor, on the part
    that this process holds.

    Args:
        values: any shape, float.
        indices: flat, distinct, int64, in ``[0, values.numel())``.

    Raises:
        IndexError, RuntimeError: an index is out of range.

    Example:
        >>> import torch
        >>> values = torch.tensor([1.0, -0.0, 3.0])
        >>> flip_signs(values, torch.tensor([0, 1]))
        >>> values
        tensor([-1., 0., 3.])
    """
    memory, places = memory_of(*local_part(values, indices))
    # Adding the sign bit to an integer flips this bit and no other (the carry falls off): an exclusive or that
    # reads and writes in one pass.
    sign_bit = torch.tensor(torch.iinfo(memory.dtype).min, dtype=memory.dtype, device=memory.device)
    memory.index_add_(0, places, sign_bit.expand(places.shape))
