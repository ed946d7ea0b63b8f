"""Arguments of error models, and the flips that they return."""

import numpy as np
import pytest
import torch
from torch import nn

from bnnft import accuracy_over_ber, flipped
from bnnft.ber import ErrorModel, Independent, as_error_model, checked_flips, checked_rate
from bnnft.nn import BinaryActivation, BinaryLinear

WEIGHT = torch.zeros(4, 5)


@pytest.mark.parametrize("value", [0, 1, 0.0, 0.25, 1.0])
def test_fractions_are_rates(value):
    assert checked_rate(value) == value
    assert isinstance(checked_rate(value), float)


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


def test_rates_of_any_number_type_become_floats():
    assert type(Independent(np.float16(0.1)).rate) is float


@pytest.mark.parametrize("flips", [[], [0], [19], [0, 19], list(range(20))], ids=str)
def test_sorted_distinct_places_of_a_weight_are_flips(flips):
    flips = torch.tensor(flips, dtype=torch.int64)
    assert checked_flips(flips, WEIGHT, Independent(0.1), "fc1.weight") is flips


@pytest.mark.parametrize(
    ("flips", "error", "says"),
    [
        ([1, 2], TypeError, "an int64 tensor of one dimension on cpu, got list"),
        (torch.tensor([1.0]), TypeError, r"an int64 tensor .* got one of shape \(1,\) and type torch.float32 on cpu"),
        (torch.tensor([1], dtype=torch.int32), TypeError, r"an int64 tensor .* got one of .* type torch.int32"),
        (torch.tensor([True]), TypeError, r"an int64 .* type torch.bool"),
        (torch.tensor([]), TypeError, r"an int64 .* type torch.float32"),
        (torch.tensor(1), TypeError, r"an int64 .* of shape \(\)"),
        (torch.tensor([[1], [2]]), TypeError, r"an int64 .* of shape \(2, 1\)"),
        (torch.tensor([1], device="meta"), TypeError, r"an int64 .* on meta"),
        (torch.tensor([0, 2, 1, 3]), ValueError, r"sorted and distinct, got \[2, 1\] at place 1"),
        (torch.tensor([0, 1, 4, 4]), ValueError, r"sorted and distinct, got \[4, 4\] at place 2"),
        (torch.tensor([-1, 3]), ValueError, r"in \[0, 19\], got -1"),
        (torch.tensor([3, 20]), ValueError, r"in \[0, 19\], got 20"),
        (torch.tensor([10**12]), ValueError, r"in \[0, 19\], got 1000000000000"),
    ],
    ids=str,
)
def test_all_else_is_refused_with_error_model_and_layer(flips, error, says):
    with pytest.raises(error, match=rf"flips of Independent\(rate=0.1\) for 'fc1.weight' must be {says}"):
        checked_flips(flips, WEIGHT, Independent(0.1), "fc1.weight")


def test_a_weight_without_a_bit_has_no_flips():
    with pytest.raises(ValueError, match="got 0"):
        checked_flips(torch.tensor([0]), torch.zeros(0, 3), Independent(0.1), "fc1.weight")


class Twice(ErrorModel):
    """Lists a bit twice."""

    axis, points = "bit", (1,)

    def __init__(self, bit=1):
        self.bit = bit

    def flips(self, weight, key):
        return torch.tensor([self.bit, self.bit])


class Centred(nn.Linear):
    """Its bits are made in its forward, and have no latent weight."""

    def forward(self, x):
        return nn.functional.linear(x, (self.weight - self.weight.mean(1, keepdim=True)).sign())


@pytest.mark.parametrize(("target", "layer"), [("weights", "0.weight"), ("activations", "1")])
def test_flips_are_checked_wherever_they_are_drawn(target, layer):
    model = nn.Sequential(BinaryLinear(8, 4, bias=False), BinaryActivation())
    says = rf"flips of Twice\(bit=1\) for '{layer}' must be sorted and distinct"
    with pytest.raises(ValueError, match=says), flipped(model, Twice(), target=target):
        model(torch.randn(2, 8))


def test_flips_are_checked_where_a_forward_makes_the_bits():
    data = [(torch.randn(4, 8), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(ValueError, match=r"flips of Twice\(bit=1\) for 'weight' must be sorted and distinct"):
        accuracy_over_ber(Centred(8, 4), data, maps=1, error_model=Twice())


def test_flips_that_were_right_are_looked_at_again_when_they_were_written_to():
    flips, weight = torch.tensor([1, 4, 7]), torch.zeros(3, 3)
    for _ in range(2):
        assert checked_flips(flips, weight, "Mine()", "fc") is flips
    flips[2] = 4
    with pytest.raises(ValueError, match=r"sorted and distinct, got \[4, 4\] at place 1"):
        checked_flips(flips, weight, "Mine()", "fc")
    with torch.inference_mode():
        made = torch.tensor([1, 4, 7])
        assert checked_flips(made, weight, "Mine()", "fc") is made
        made[0] = 5
        with pytest.raises(ValueError, match=r"sorted and distinct, got \[5, 4\] at place 0"):
            checked_flips(made, weight, "Mine()", "fc")
