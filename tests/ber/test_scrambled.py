"""Errors that know ones from zeros fall on both alike; the contract is in test_error_models.py."""

import pytest
import torch

from bnnft.ber import Asymmetric, Chip, Independent, Key, Scrambled


def test_every_stored_bit_that_is_wrong_is_one_of_the_kind_that_fails():
    """With a rate of 1 for stored ones: what reads wrong tells the mask, which is fixed and as good as fair."""
    model, weight = Scrambled(Asymmetric(0, 1)), torch.randn(100, 100)
    flips = [model.flips(each, Key(seed, 0, 1)) for each, seed in ((weight, 0), (weight, 5), (-weight, 0))]
    assert torch.equal(flips[0], flips[1])
    assert set(flips[0].tolist()).isdisjoint(flips[2].tolist())
    assert len(flips[0]) + len(flips[2]) == 10_000
    assert abs(len(flips[0]) - 5000) < 6 * 50


def test_masks_differ_by_number_and_by_weight():
    weight = torch.ones(50, 50)
    one, other = (Scrambled(Asymmetric(0, 1), mask).flips(weight, Key()) for mask in (0, 1))
    elsewhere = Scrambled(Asymmetric(0, 1)).flips(weight, Key(position=1))
    assert not torch.equal(one, other)
    assert not torch.equal(one, elsewhere)


def test_errors_that_know_no_bits_are_as_they_were():
    weight = torch.randn(50, 50)
    assert torch.equal(Scrambled(0.1).flips(weight, Key(2)), Independent(0.1).flips(weight, Key(2)))
    assert Scrambled(Asymmetric(0, 0.2), scale=0.5).bit_rates() == (0.05, 0.05)
    assert Scrambled(Chip(0.1)).bit_rates() == (0.1, 0.1)


@pytest.mark.parametrize("mask", [-1, True, 0.5])
def test_the_mask_is_a_number(mask):
    with pytest.raises(ValueError, match="mask must be an integer >= 0"):
        Scrambled(0.1, mask)
