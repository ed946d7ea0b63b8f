"""Rates of both bits are held in test_error_models.py; here what is special about two rates."""

import pytest
import torch
from scipy.stats import binomtest

from bnnft.ber import Asymmetric, Independent, Key

ONES, ZEROS = torch.ones(200_000), -torch.ones(200_000)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.7, 1.0])
def test_equal_rates_are_independent_flips_bit_for_bit(rate):
    key = Key(3, position=2)
    assert torch.equal(Asymmetric(rate, rate).flips(ONES, key), Independent(rate).flips(ONES, key))


def test_bits_of_the_smaller_rate_fail_where_they_would_at_the_larger_one_and_independently_so():
    """Exact binomial test of what is kept; false alarm 1e-9."""
    all_of_them = Independent(0.2).flips(ONES, Key(1))
    kept = Asymmetric(0.2, 0.05).flips(ONES, Key(1))
    assert torch.equal(Asymmetric(0.2, 0.05).flips(ZEROS, Key(1)), all_of_them)
    assert set(kept.tolist()) < set(all_of_them.tolist())
    assert binomtest(len(kept), len(all_of_them), 0.25).pvalue > 1e-9


def test_a_rate_of_zero_leaves_its_bit_right():
    assert len(Asymmetric(0, 1).flips(ZEROS, Key())) == 0
    assert len(Asymmetric(1, 0).flips(ZEROS, Key())) == len(ZEROS)


def test_another_rate_keeps_the_relation_of_both():
    assert Asymmetric(0.02, 0.01).at_rate(0.15) == Asymmetric(0.2, 0.1)
    assert Asymmetric(0, 0).at_rate(0) == Asymmetric(0, 0)
    with pytest.raises(ValueError, match=r"have no relation to keep at rate 0\.1"):
        Asymmetric(0, 0).at_rate(0.1)
    with pytest.raises(ValueError, match=r"rate_0_to_1 must be a fraction in \[0, 1\], got 1.2"):
        Asymmetric(0.02, 0.0).at_rate(0.6)


@pytest.mark.parametrize("name", ["rate_0_to_1", "rate_1_to_0"])
@pytest.mark.parametrize(("value", "error"), [(-0.1, ValueError), (1.1, ValueError), ("0.1", TypeError)])
def test_what_is_no_rate_is_refused_by_name(name, value, error):
    with pytest.raises(error, match=rf"{name} must be a fraction in \[0, 1\], got"):
        Asymmetric(**{"rate_0_to_1": 0.1, "rate_1_to_0": 0.1, name: value})
