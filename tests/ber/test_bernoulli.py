"""Each statistical test has a fixed seed and would fail by chance with the probability named beside it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare

from bnnft.ber import Key, bernoulli
from bnnft.ber.bernoulli import bernoulli_indices
from bnnft.ber.random_bits import random_words, split, uniforms

FALSE_ALARM = 1e-9
MASK = 2**64 - 1
words = st.integers(0, MASK)
fixed = settings(derandomize=True, database=None, deadline=None, max_examples=60)


def walk(size, rate, stream):
    """The successes, gap by gap."""
    found, place, number = [], -1, 0
    while rate > 0:
        place += math.floor(math.log(float(uniforms(stream, number, 1))) / math.log1p(-rate)) + 1
        number += 1
        if place >= size:
            break
        found.append(place)
    return found


def digit_by_digit(size, rate, stream):
    """The successes, by comparing the first eight digits of a random number with those of the rate."""
    digits, streams = int(rate * 256), [split(stream, MASK - 8 + number) for number in range(9)]
    drawn = [random_words(each, 0, -(-size // 64)).tolist() for each in streams[:8]]
    found = set()
    for trial in range(size):
        ones = [drawn[place][trial // 64] >> trial % 64 & 1 for place in range(8)]
        if sum((1 - one) << place for place, one in enumerate(ones)) < digits:
            found.add(trial)
    return sorted(found | set(walk(size, (rate - digits / 256) / (1 - digits / 256), streams[8])))


def expected(size, rate, stream):
    if rate > 7 / 8:
        return sorted(set(range(size)) - set(walk(size, 1 - rate, stream)))
    return walk(size, rate, stream) if rate < 1 / 8 else digit_by_digit(size, rate, stream)


@fixed
@given(
    size=st.integers(0, 500),
    rate=st.one_of(st.sampled_from([0.0, 0.125, 0.3, 0.5, 0.875, 1.0]), st.floats(1e-15, 1)),
    stream=words,
)
def test_indices_are_those_of_a_walk_trial_by_trial(size, rate, stream):
    assert bernoulli_indices(size, rate, stream).tolist() == expected(size, rate, stream)


@pytest.mark.parametrize("rate", [1e-12, 1e-3, 0.1, 0.5, 0.7, 0.999, 1 - 1e-12])
@pytest.mark.parametrize("size", [0, 1, 7, 100_000])
def test_indices_are_sorted_distinct_and_in_range(size, rate):
    indices = bernoulli_indices(size, rate, Key(1).stream())
    assert indices.dtype == torch.int64
    assert bool((indices.diff() > 0).all())
    assert bool(((indices >= 0) & (indices < size)).all())


@pytest.mark.parametrize("rate", [0.01, 0.12, 0.125, 0.13, 0.3, 0.5, 0.6, 0.87, 0.88, 0.99])
def test_successes_have_the_rate_and_are_independent_of_their_neighbours(rate):
    """Exact binomial tests on a million trials, and on pairs 1, 63 and 64 apart; false alarm 4e-8 together."""
    size = 1_000_000
    trials = torch.zeros(size, dtype=torch.bool)
    trials[bernoulli_indices(size, rate, Key(4).stream())] = True
    assert binomtest(int(trials.sum()), size, rate).pvalue > FALSE_ALARM
    for distance in (1, 63, 64):
        apart = trials[: size // 128 * 128].view(-1, 128)  # pairs that share no trial
        both = int((apart[:, 0] & apart[:, distance]).sum())
        assert binomtest(both, len(apart), rate**2).pvalue > FALSE_ALARM


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_every_place_in_a_word_has_the_rate(rate):
    """Chi-squared of 64 counts of 20,000 trials each; false alarm 1e-9."""
    indices = bernoulli_indices(64 * 20_000, rate, Key(6).stream())
    counts = torch.bincount(indices % 64, minlength=64)
    statistic = chisquare(counts.numpy(), [counts.sum().item() / 64] * 64).statistic / (1 - rate)
    assert statistic < 149  # the 1 - 1e-9 quantile for 63 degrees of freedom is 148.9


@pytest.mark.parametrize("size", [0, 1, 1000])
@pytest.mark.parametrize("stream", [0, 5, MASK])
def test_rate_0_has_no_success_and_rate_1_no_failure(size, stream):
    assert bernoulli_indices(size, 0, stream).tolist() == []
    assert bernoulli_indices(size, 1, stream).tolist() == list(range(size))


@pytest.mark.parametrize("rate", [1e-300, 1e-12, 0.1])
def test_the_largest_uniform_is_the_shortest_gap(rate, monkeypatch):
    monkeypatch.setattr(bernoulli, "mixed", lambda words, *rest: words.fill_(-1))
    assert bernoulli_indices(1, rate, 0).tolist() == [0]


@pytest.mark.parametrize(
    ("rate", "size", "found"), [(1e-300, 10**15, []), (1e-12, 10**13, []), (0.1, 348, []), (0.1, 349, [348])]
)
def test_the_smallest_uniform_is_the_longest_gap(rate, size, found, monkeypatch):
    """floor(log(2^-53) / log(1 - rate)) is 348 for a rate of 0.1, and 3.7e13 for 1e-12."""
    monkeypatch.setattr(bernoulli, "mixed", lambda words, *rest: words.zero_())
    assert bernoulli_indices(size, rate, 0).tolist() == found


def test_work_at_a_tiny_rate_goes_with_the_successes():
    """A million successes are expected among 10^18 trials; exact binomial test, false alarm 1e-9."""
    counts = [len(bernoulli_indices(10**15, 1e-12, Key(2, draw).stream())) for draw in range(1000)]
    assert binomtest(sum(counts), 10**18, 1e-12).pvalue > FALSE_ALARM


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_indices_do_not_depend_on_the_size_of_a_block(rate, block, monkeypatch):
    whole = bernoulli_indices(3000, rate, stream=11)
    monkeypatch.setattr(bernoulli, "BLOCK", block)
    assert torch.equal(bernoulli_indices(3000, rate, stream=11), whole)


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
def test_a_longer_run_of_trials_begins_with_the_shorter_one(rate):
    long = bernoulli_indices(70_000, rate, stream=3)
    assert torch.equal(bernoulli_indices(1000, rate, stream=3), long[long < 1000])


@pytest.mark.parametrize("rate", [0.1, 0.7])
def test_torch_generator_is_untouched(rate):
    before = torch.get_rng_state()
    bernoulli_indices(1000, rate, Key(3).stream())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("block", [1, 3, 2**15])
@pytest.mark.parametrize("rate", [0.1, 0.2])
def test_the_last_trial_may_be_a_success(block, rate, monkeypatch):
    """Whatever the work is split into, and wherever the trials end."""
    every = expected(200, rate, 11)
    monkeypatch.setattr(bernoulli, "BLOCK", block)
    for last in every:
        assert bernoulli_indices(last + 1, rate, stream=11).tolist() == [each for each in every if each <= last]
        assert bernoulli_indices(last, rate, stream=11).tolist() == [each for each in every if each < last]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_words_are_unpacked_alike_by_numpy_and_by_torch(count):
    drawn = random_words(9, 0, count)
    bits = (drawn[:, None] >> torch.arange(64)).bitwise_and(1).bool().view(-1)
    assert torch.equal(bernoulli._unpacked(drawn), bits)
