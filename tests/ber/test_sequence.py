"""Errors on errors; their draws are held in test_error_models.py."""

from dataclasses import dataclass

import pytest
import torch

from bnnft.ber import Asymmetric, Chip, ErrorModel, Independent, Key, PerLayer, Sequence

WEIGHT = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))


def test_a_bit_that_is_flipped_twice_is_right_again():
    first, second = Chip(0.3, chip=7), Independent(0.4)
    flipped = torch.zeros(2, WEIGHT.numel(), dtype=torch.bool)
    flipped[0, first.flips(WEIGHT, Key(1))] = True
    flipped[1, second.flips(WEIGHT, Key(1).part(1))] = True
    expected = (flipped[0] ^ flipped[1]).nonzero().squeeze(1)
    assert torch.equal(Sequence([first, second]).flips(WEIGHT, Key(1)), expected)
    assert len(Sequence([first, first]).flips(WEIGHT, Key(1))) == 0


def test_a_later_error_reads_what_the_earlier_ones_left():
    ones_to_zeros, zeros_to_ones = Asymmetric(0, 1), Asymmetric(1, 0)
    assert len(Sequence([ones_to_zeros, zeros_to_ones]).flips(torch.ones(10), Key())) == 0
    assert len(Sequence([zeros_to_ones, ones_to_zeros]).flips(torch.ones(10), Key())) == 10
    zeros = torch.tensor([0.0, -0.0])
    assert Sequence([ones_to_zeros, zeros_to_ones]).flips(zeros, Key()).tolist() == [1]


def test_equal_parts_of_a_sequence_draw_apart():
    assert len(Sequence([0.5, 0.5]).flips(WEIGHT, Key(1))) > 4000


@pytest.mark.parametrize("flips", [[3, 1], [1, 1], [10**6]], ids=str)
def test_flips_of_a_part_are_checked_by_its_name(flips):
    @dataclass(frozen=True)
    class Wrong(ErrorModel):
        def flips(self, weight, key):
            return torch.tensor(flips)

    with pytest.raises(ValueError, match=r"flips of .*Wrong\(\) for 'fc1.weight' must be"):
        Sequence([Wrong(), Wrong()]).flips(WEIGHT, Key(name="fc1.weight"))


def test_patterns_of_a_part_must_match_a_weight():
    with pytest.raises(ValueError, match="the pattern 'conv' matches no weight"):
        Sequence([0.1, PerLayer({"*": 0.1, "conv": 0.1})]).check_layers(["fc1.weight"])


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: Sequence([]), TypeError, "models must be a list of one or more rates or error models"),
        (lambda: Sequence("0.1"), TypeError, "rate must be a fraction"),
        (lambda: Sequence([0.1], scale="2"), ValueError, "scale must be a number >= 0, got '2'"),
    ],
)
def test_bad_arguments_are_named(build, error, says):
    with pytest.raises(error, match=says):
        build()
