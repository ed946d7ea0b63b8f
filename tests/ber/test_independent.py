"""The independence of independent flips: exact binomial tests, each fails by chance with a probability of 1e-9."""

import pytest
import torch
from scipy.stats import binomtest

from bnnft.ber import Independent, Key


def agree(count, trials, rate):
    return binomtest(int(count), int(trials), rate).pvalue > 1e-9


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
