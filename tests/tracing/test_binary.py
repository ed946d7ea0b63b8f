"""The one answer to whether a tensor holds two values."""

import pytest
import torch

from bnnft.tracing.binary import differs_at_once, same_sides, sides_of, two_values

SIGNS = torch.randn(24, 30, generator=torch.Generator().manual_seed(0)).sign()
SCALES = torch.rand(24, 1, generator=torch.Generator().manual_seed(1)) + 0.5
COLUMNS = torch.rand(1, 30, generator=torch.Generator().manual_seed(1)) + 0.5
FLOATS = torch.randn(24, 30, generator=torch.Generator().manual_seed(2))


def with_zeros(count):
    values = SIGNS.clone()
    values.view(-1)[torch.arange(count) * 7] = 0
    return values


SYMMETRIC = {
    "signs": (SIGNS, torch.ones(1, 1)),
    "scaled": (0.02 * SIGNS, torch.full((1, 1), 0.02)),
    "scaled rows": (SIGNS * SCALES, SCALES),
    "scaled columns": (SIGNS * COLUMNS, COLUMNS),
    "one dimension": (SIGNS[0], torch.ones(1)),
    "kernels": (SIGNS.view(24, 5, 6) * SCALES[:, :, None], SCALES[:, :, None]),
    "rounded": (SIGNS * (1 + 1e-6 * FLOATS), torch.full((1, 1), 1.0)),
    "a few zeros": (with_zeros(7), torch.ones(1, 1)),
    "two": (torch.tensor([1.0, -1.0]), torch.ones(1)),
    "huge": (1e30 * SIGNS, torch.full((1, 1), 1e30)),
    "tiny": (1e-30 * SIGNS, torch.full((1, 1), 1e-30)),
}


@pytest.mark.parametrize(("values", "half"), SYMMETRIC.values(), ids=SYMMETRIC)
def test_two_values_that_are_minus_c_and_c(values, half):
    found = two_values(values)
    assert found.symmetric
    assert found.middle.item() == 0
    assert torch.allclose(found.half.expand_as(values), half.expand_as(values), rtol=1e-4)
    assert found.half.numel() <= values.numel() / 2
    assert torch.equal(sides_of(values, found), values.sign().to(torch.int8))


APART = {
    "zeros and ones": ((SIGNS + 1) / 2, 0.5, 0.5),
    "shifted": (SIGNS * 0.1 + 3, 3.0, 0.1),
    "one sign": (-2 - SIGNS, -2.0, 1.0),
    "shifted rows": (SIGNS * SCALES + 1, 1.0, SCALES),
    "mean and deviation": (SIGNS * SCALES + SCALES / 3, SCALES / 3, SCALES),
}


@pytest.mark.parametrize(("values", "middle", "half"), APART.values(), ids=APART)
def test_two_other_values(values, middle, half):
    found = two_values(values)
    assert not found.symmetric
    assert torch.allclose(found.middle.expand_as(values), torch.as_tensor(middle).expand_as(values), atol=1e-5)
    assert torch.allclose(found.half.expand_as(values), torch.as_tensor(half).expand_as(values), atol=1e-5)
    expected = torch.where(values > torch.as_tensor(middle), 1, -1).to(torch.int8)
    assert torch.equal(sides_of(values, found), expected)


MORE_OR_LESS = {
    "floats": FLOATS,
    "three": (FLOATS * 2).round().clamp(-1, 1),
    "a third zeros": with_zeros(100),
    "zeros and ones and a two": ((SIGNS + 1) / 2).index_put((torch.tensor(20), torch.tensor(25)), torch.tensor(2.0)),
    "four": SIGNS + 0.3 * SIGNS.roll(1),
    "constant": torch.ones(24, 30),
    "zeros": torch.zeros(24, 30),
    "one number": torch.tensor(1.0),
    "one element": torch.ones(1, 1),
    "empty": torch.ones(0, 3),
    "integers": SIGNS.long(),
    "one that differs": SIGNS.index_put((torch.tensor(20), torch.tensor(25)), torch.tensor(0.5)),
    "not a number": SIGNS.index_put((torch.tensor(20), torch.tensor(25)), torch.tensor(torch.nan)),
    "infinite": SIGNS.index_put((torch.tensor(20), torch.tensor(25)), torch.tensor(torch.inf)),
    "pairs with scales of their own": FLOATS[:, :2],
    "rows and columns that are scaled": SIGNS * SCALES * COLUMNS,
}


@pytest.mark.parametrize("values", MORE_OR_LESS.values(), ids=MORE_OR_LESS)
def test_more_or_fewer_values(values):
    assert two_values(values) is None


@pytest.mark.parametrize("values", [0.3 * torch.ones(4, 5), -torch.ones(4, 5)], ids=["positive", "negative"])
def test_one_value_is_taken_for_one_of_two_where_that_is_enough(values):
    found = two_values(values, one_is_enough=True)
    assert found.symmetric
    assert torch.equal(sides_of(values, found), values.sign().to(torch.int8))


def test_zeros_are_never_two_values_and_zeros_and_ones_are_no_signs():
    assert two_values(torch.zeros(4, 5), one_is_enough=True) is None
    ones = two_values((SIGNS + 1) / 2, one_is_enough=True)
    assert (ones.symmetric, ones.middle.item()) == (False, 0.5)
    assert two_values(with_zeros(100), one_is_enough=True) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_signs_with_an_estimator_are_two_values_in_any_number_format(dtype):
    """w + (sign(w) / 10 - w) is rounded."""
    latent = FLOATS.clamp(-1, 1).to(dtype)
    assert two_values(latent + (latent.sign() / 10 - latent)) is not None
    assert two_values(latent) is None


def test_the_quick_look_is_sure_where_it_says_more_than_two():
    """It never says so of two values, and says so of nearly all floats."""
    everything = [values for values, *_ in (SYMMETRIC | APART).values()]
    assert not any(differs_at_once(values) for values in everything)
    generator = torch.Generator().manual_seed(0)
    assert all(differs_at_once(torch.randn(24, 30, generator=generator)) for _ in range(100))
    assert not differs_at_once(torch.randn(2, 2))


def test_sides_agree_up_to_a_sign_for_each_line_along_one_dimension():
    sides = SIGNS.to(torch.int8)
    rows = torch.where(SCALES > 1, 1, -1).to(torch.int8)
    assert same_sides(sides, sides)
    assert same_sides(sides, -sides)
    assert same_sides(sides, sides * rows)
    assert same_sides(sides.t(), (sides * rows).t())
    other = sides.clone()
    other[3, 4] *= -1
    assert not same_sides(sides, other)
    other[3, 4] = 0  # what is neither agrees with both
    assert same_sides(sides, other)
