"""Sign bits are flipped where they lie, for every float type and layout, and nothing else is touched."""

import pytest
import torch
from layouts import bits_of, every_float, every_layout, random_values

from bnnft.injection.signs import flip_signs, raw_values


@every_float
@every_layout
def test_the_sign_bits_at_the_indices_change_and_nothing_else(dtype, layout):
    values = random_values(layout, dtype)
    memory = torch.empty(0, dtype=dtype).set_(values.untyped_storage())  # with what lies between the elements
    before, around = bits_of(values), bits_of(memory)
    indices = torch.arange(0, values.numel(), 3)
    flip_signs(values, indices)
    expected = before.flatten()
    expected[indices] ^= torch.iinfo(expected.dtype).min
    assert torch.equal(bits_of(values).flatten(), expected)
    assert int((bits_of(memory) != around).sum()) == len(indices)
    flip_signs(values, indices)
    assert torch.equal(bits_of(memory), around)


@every_float
@every_layout
def test_raw_values_are_the_bits_in_the_order_of_rows(dtype, layout):
    values = random_values(layout, dtype)
    indices = torch.arange(0, values.numel(), 2)
    assert torch.equal(raw_values(values, indices), bits_of(values).flatten()[indices])


def test_a_flip_is_a_write_that_autograd_sees():
    values = torch.ones(3)
    version = values._version
    flip_signs(values, torch.tensor([1]))
    assert values._version > version


@pytest.mark.parametrize("index", [3, 10**6, -(10**6)])
def test_an_index_out_of_range_is_an_error(index):
    with pytest.raises((IndexError, RuntimeError)):
        flip_signs(torch.ones(3), torch.tensor([index]))
