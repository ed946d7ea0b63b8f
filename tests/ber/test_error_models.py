"""The contract of every error model, and the independence of independent flips.

Counts are held against exact binomial tests: each fails by chance with a probability of 1e-9, for a fixed seed.
"""

import importlib
import pkgutil
from dataclasses import dataclass, is_dataclass

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

import bnnft.ber
from bnnft.ber import ErrorModel, Independent, Key, as_error_model, checked_rate

FALSE_ALARM = 1e-9


@dataclass(frozen=True)
class Example:
    model: ErrorModel
    rate_of_zeros: float
    """Probability that a stored 0 reads wrong."""
    rate_of_ones: float


# An error model needs an entry here, and its class is then held to the contract below.
EXAMPLES = {"Independent": [Example(Independent(rate), rate, rate) for rate in (0.001, 0.1, 0.5, 0.8)]}


def error_model_classes():
    modules = [importlib.import_module(f"bnnft.ber.{file.name}") for file in pkgutil.iter_modules(bnnft.ber.__path__)]
    classes = {value for module in (bnnft.ber, *modules) for value in vars(module).values() if isinstance(value, type)}
    return {cls.__name__ for cls in classes if is_dataclass(cls) and hasattr(cls, "flips") and cls is not ErrorModel}


every_model = pytest.mark.parametrize(
    "example",
    [example for examples in EXAMPLES.values() for example in examples],
    ids=lambda example: str(example.model),
)


@pytest.fixture(scope="module")
def weight():
    return torch.randn(300, 1001, generator=torch.Generator().manual_seed(0))


def agree(count, trials, rate):
    return binomtest(int(count), int(trials), rate).pvalue > FALSE_ALARM


@pytest.mark.parametrize("name", sorted(error_model_classes()))
def test_every_error_model_has_an_example(name):
    assert name in EXAMPLES, f"add an example of {name} to EXAMPLES in {__file__}: it is held to the contract there"


def test_every_example_is_found_in_the_package():
    assert set(EXAMPLES) == error_model_classes()


@every_model
def test_model_is_an_error_model(example):
    assert isinstance(example.model, ErrorModel)
    assert as_error_model(example.model) is example.model


@every_model
def test_flips_are_sorted_distinct_int64_indices_on_the_device_of_the_weight(example, weight):
    flips = example.model.flips(weight, Key(1))
    assert flips.dtype == torch.int64
    assert flips.device == weight.device
    assert flips.ndim == 1
    assert bool((flips.diff() > 0).all())
    assert bool(((flips >= 0) & (flips < weight.numel())).all())


@every_model
@pytest.mark.parametrize("shape", [(0,), (), (1,), (3, 1, 2)])
def test_small_weights_have_flips_in_range(example, shape):
    flips = example.model.flips(torch.randn(shape), Key(1))
    assert set(flips.tolist()) <= set(range(torch.Size(shape).numel()))


@every_model
@pytest.mark.parametrize("seed", range(2))
def test_flip_rate_of_each_stored_bit_is_the_stated_one(example, weight, seed):
    flips = example.model.flips(weight, Key(seed))
    ones = weight.flatten() > 0
    assert agree(ones[flips].sum(), ones.sum(), example.rate_of_ones)
    assert agree((~ones[flips]).sum(), (~ones).sum(), example.rate_of_zeros)


@every_model
def test_same_key_gives_the_same_flips(example, weight):
    expected = example.model.flips(weight, Key(1, 2, 3, "test", "a.weight"))
    assert torch.equal(example.model.flips(weight, Key(1, 2, 3, "test", "a.weight")), expected)


@every_model
@pytest.mark.parametrize("other", [Key(2), Key(1, draw=1), Key(1, position=1), Key(1, purpose="test")], ids=str)
def test_other_keys_give_other_flips(example, weight, other):
    assert not torch.equal(example.model.flips(weight, other), example.model.flips(weight, Key(1)))


@every_model
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_flips_depend_on_the_signs_alone(example, weight, dtype):
    expected = example.model.flips(weight, Key(1))
    assert torch.equal(example.model.flips(weight.sign().to(dtype), Key(1)), expected)
    assert torch.equal(example.model.flips(3 * weight, Key(1)), expected)
    assert torch.equal(example.model.flips(weight.t().contiguous().t(), Key(1)), expected)


@every_model
def test_drawing_changes_neither_the_weight_nor_torch_generator(example, weight):
    before, state = weight.clone(), torch.get_rng_state()
    example.model.flips(weight, Key(1))
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), state)


def dense(rate, key, size=600_000):
    """Independent flips as a mask."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[Independent(rate).flips(mask, key)] = True
    return mask


every_rate = pytest.mark.parametrize("rate", [0.01, 0.1, 0.4, 0.7])


@every_rate
@pytest.mark.parametrize("lag", [1, 2, 3, 8, 1024])
def test_independent_flips_at_a_distance_are_independent(rate, lag):
    """Pairs that share no bit: both flip with probability rate^2."""
    pairs = dense(rate, Key(4))[: 600_000 // (2 * lag) * 2 * lag].view(-1, 2, lag)
    both = pairs.all(1)
    assert agree(both.sum(), both.numel(), rate**2)


@every_rate
@pytest.mark.parametrize("after", [Key(5, draw=1), Key(5, position=1), Key(6), Key(5, purpose="test")], ids=str)
def test_independent_flips_of_neighbouring_keys_are_independent(rate, after):
    both = dense(rate, Key(5)) & dense(rate, after)
    assert agree(both.sum(), both.numel(), rate**2)


@every_rate
def test_each_pattern_of_three_neighbours_has_its_probability(rate):
    patterns = dense(rate, Key(7)).view(-1, 3)
    for pattern in torch.cartesian_prod(*[torch.tensor([False, True])] * 3):
        flips = int(pattern.sum())
        count = (patterns == pattern).all(1).sum()
        assert agree(count, len(patterns), rate**flips * (1 - rate) ** (3 - flips))


@pytest.mark.parametrize("place", [0, 1, 499, 999])
def test_independent_flips_have_the_same_rate_at_every_place_of_a_weight(place):
    """The first and last places among them, where a run of gaps starts and is cut."""
    count = sum(place in Independent(0.1).flips(torch.empty(1000), Key(8, draw)) for draw in range(3000))
    assert agree(count, 3000, 0.1)


@pytest.mark.parametrize("value", [0, 1, 0.0, 0.25, 1.0])
def test_fractions_are_rates(value):
    assert checked_rate(value) == value
    assert isinstance(checked_rate(value), float)
    assert as_error_model(value) == Independent(value)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (float("nan"), ValueError),
        (-0.1, ValueError),
        (1.5, ValueError),
        (float("inf"), ValueError),
        ("0.1", TypeError),
        (True, TypeError),
        (None, TypeError),
        (0.1j, TypeError),
        (torch.tensor(0.1), TypeError),
    ],
)
@pytest.mark.parametrize("build", [checked_rate, Independent, as_error_model])
def test_what_is_no_fraction_is_refused_by_name(value, error, build):
    with pytest.raises(error, match=r"rate must be a fraction in \[0, 1\], got"):
        build(value)


def test_error_names_the_parameter_that_is_wrong():
    with pytest.raises(ValueError, match=r"rate_of_ones must be a fraction in \[0, 1\], got 2"):
        checked_rate(2, "rate_of_ones")


def test_a_class_is_no_error_model():
    with pytest.raises(TypeError, match="rate must be a fraction"):
        as_error_model(Independent)


def test_rates_of_any_number_type_become_floats():
    assert type(Independent(np.float16(0.1)).rate) is float
