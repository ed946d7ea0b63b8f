"""Small integers times a power of two are found where they are, and nothing else is taken for them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnnft.nn.integers import on_grid


@given(
    whole=st.lists(st.integers(-128, 127), min_size=1, max_size=50),
    exponent=st.integers(-24, 24),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_integers_times_a_power_of_two_are_found(whole, exponent, dtype):
    values = torch.tensor(whole, dtype=dtype) * 2.0**exponent
    integers, step = on_grid(values)
    assert integers.dtype == torch.int8
    assert torch.equal(integers.to(dtype) * step, values)


@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=20),
    whole=st.lists(st.integers(-128, 127), max_size=20),
)
def test_what_is_found_is_equal(values, whole):
    values = torch.tensor([*whole, *values])
    found = on_grid(values)
    if found is None:
        assert not torch.equal(values.to(torch.int8).float(), values)
    else:
        assert torch.equal(found[0] * found[1], values)


@pytest.mark.parametrize("value", [0.3, 1 / 3, 128.5, 1e-30, 1e30, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 70_000, 199_999])
def test_one_value_off_the_grid_is_seen_wherever_it_is(value, place):
    values = torch.ones(200_000)
    values[place] = value
    assert on_grid(values) is None


def test_no_range_of_more_than_eight_bits_is_found():
    assert on_grid(torch.tensor([-128.0, 127.0])) is not None
    assert on_grid(torch.tensor([-1.0, 128.0])) is None
    assert on_grid(torch.tensor([-129.0, 1.0])) is None
    assert on_grid(torch.tensor([2.0, 128.0])) is not None  # in twos


def test_pixels_and_digits_are_found():
    pixels, digits = (torch.arange(256.0) - 128) / 128, torch.arange(17.0) / 8 - 1
    assert on_grid(pixels)[1] == 1 / 128
    assert on_grid(digits)[1] == 1 / 64
    assert on_grid(torch.arange(256.0) / 127.5 - 1) is None


def test_biases_have_to_lie_on_the_grid():
    x = torch.tensor([1.0, -0.5])
    assert on_grid(x, torch.tensor([3.0, -0.5])) is not None
    assert on_grid(x, torch.tensor([3.0, 0.1])) is None
    assert on_grid(x, torch.tensor([3.0, torch.nan])) is None
    assert on_grid(x, torch.tensor([2.0**30])) is None
