"""Float tensors of every type and memory layout, of random bits."""

import pytest
import torch

INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
LAYOUTS = {
    "1": lambda new: new(1),
    "7": lambda new: new(7),
    "1023": lambda new: new(1023),
    "matrix": lambda new: new(33, 31),
    "empty": lambda new: new(0, 3),
    "transposed": lambda new: new(33, 31).t(),
    "permuted": lambda new: new(3, 5, 7).permute(1, 2, 0),
    "channels last": lambda new: new(4, 3, 5, 5).to(memory_format=torch.channels_last),
    "sliced": lambda new: new(20, 31)[3:18:2, 1:30:3],
    "sliced and transposed": lambda new: new(20, 31)[3:, 1:].t(),
}
every_float = pytest.mark.parametrize("dtype", INTEGERS, ids=str)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def random_values(layout, dtype):
    """Random bit patterns, among them zeros and infinities of both signs and NaN with payloads."""
    integer = INTEGERS[dtype]

    def new(*shape):
        limits = torch.iinfo(integer)
        bits = torch.randint(limits.min, limits.max, shape, dtype=integer, generator=torch.manual_seed(0))
        special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan], dtype=dtype).view(integer)
        bits.view(-1)[::3] = special[torch.arange(bits.view(-1)[::3].numel()) % 5]
        return bits

    return LAYOUTS[layout](new).view(dtype)


def bits_of(values):
    return values.detach().view(INTEGERS[values.dtype]).clone()
