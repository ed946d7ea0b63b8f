"""Each statistical test has a fixed seed and would fail by chance with the probability named beside it."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, kstest

from bnnft.ber import Key
from bnnft.ber.random_bits import below_at, places_below, random_words, split, uniforms, where_true

FALSE_ALARM = 1e-9
MASK = 2**64 - 1
GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
PUBLISHED = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]
words = st.integers(0, MASK)
fixed = settings(derandomize=True, database=None, deadline=None, max_examples=60)


def split_mix(state):
    """SplitMix64 as published: a state that advances by gamma."""
    while True:
        state = (state + GAMMA) & MASK
        word = ((state ^ (state >> 30)) * FIRST) & MASK
        word = ((word ^ (word >> 27)) * SECOND) & MASK
        yield word ^ (word >> 31)


def stream_that_starts_with(word):
    """The stream whose word 0 is the given one: every step of the mix can be undone."""
    for shift, factor in ((31, SECOND), (27, FIRST), (30, 1)):
        undone = word
        for _ in range(64 // shift):
            undone = word ^ (undone >> shift)
        word = (undone * pow(factor, -1, 2**64)) & MASK
    return (word - GAMMA) & MASK


def unsigned(tensor):
    return [word & MASK for word in tensor.tolist()]


def test_words_are_the_published_ones():
    assert unsigned(random_words(1234567, 0, 5)) == PUBLISHED


@fixed
@given(stream=words, start=st.integers(0, 2**40), count=st.integers(0, 50))
def test_words_are_those_of_the_sequential_generator_from_any_offset(stream, start, count):
    source = split_mix((stream + start * GAMMA) & MASK)
    assert unsigned(random_words(stream, start, count)) == [next(source) for _ in range(count)]


@fixed
@given(stream=words, cuts=st.lists(st.integers(0, 300), max_size=5))
def test_parts_of_a_stream_are_the_whole(stream, cuts):
    parts = [random_words(stream, a, b - a) for a, b in pairwise([0, *sorted(cuts), 300])]
    assert torch.equal(torch.cat(parts), random_words(stream, 0, 300))


@fixed
@given(stream=words)
def test_uniforms_are_the_upper_53_bits_plus_one(stream):
    expected = [((word >> 11) + 1) / 2**53 for word in unsigned(random_words(stream, 3, 20))]
    assert uniforms(stream, 3, 20).tolist() == expected


@pytest.mark.parametrize(("word", "number"), [(0, 2.0**-53), (MASK, 1.0), (2**63, 0.5 + 2.0**-53)])
def test_uniforms_reach_both_ends_of_their_range_and_no_zero(word, number):
    stream = stream_that_starts_with(word)
    assert unsigned(random_words(stream, 0, 1)) == [word]
    assert uniforms(stream, 0, 1).item() == number


@pytest.mark.parametrize("seed", range(3))
def test_uniforms_are_uniform(seed):
    """Kolmogorov-Smirnov on 100,000 numbers and on their lowest 30 bits; false alarm 1e-9."""
    numbers = uniforms(Key(seed).stream(), 0, 100_000)
    assert numbers.dtype == torch.float64
    assert bool(((numbers > 0) & (numbers <= 1)).all())
    assert torch.equal((numbers * 2**53).round() / 2**53, numbers)
    assert kstest(numbers.numpy(), "uniform").pvalue > FALSE_ALARM
    assert kstest((numbers * 2**23).frac().numpy(), "uniform").pvalue > FALSE_ALARM


def test_each_bit_of_the_words_is_fair():
    """64 exact binomial tests on 20,000 words; false alarm 6.4e-8 together."""
    stream = random_words(Key(5).stream(), 0, 20_000)
    ones = [int(((stream >> bit) & 1).sum()) for bit in range(64)]
    assert min(binomtest(count, 20_000, 0.5).pvalue for count in ones) > FALSE_ALARM


@pytest.mark.parametrize("per_number", [False, True])
def test_numbers_are_compared_to_the_last_bit(per_number):
    """A rate that is one of the numbers takes it in, and the next smaller one does not."""
    numbers = uniforms(7, 0, 2000)
    for place in range(0, 2000, 50):
        for rate, within in ((float(numbers[place]), True), (float(numbers[place]) - 2.0**-53, False)):
            limit = torch.full((2000,), rate, dtype=torch.float64) if per_number else rate
            assert (place in places_below(limit, 2000, stream=7)) == within
            assert bool(below_at(rate, 7, torch.tensor([place]))) == within


def test_torch_generator_is_untouched():
    before = torch.get_rng_state()
    places_below(0.7, 1000, Key(3).stream())
    assert torch.equal(torch.get_rng_state(), before)


def test_keys_that_differ_have_streams_that_share_no_word():
    """8 words of each of 3,072 streams; two words of 64 bits are equal by chance with probability 2e-11."""
    keys = [
        Key(seed, draw, position, purpose)
        for seed in (*range(8), 2**32, 2**63)[2:]
        for draw in range(16)
        for position in range(8)
        for purpose in ("", "training", "chip")
    ]
    drawn = torch.cat([random_words(key.stream(), 0, 8) for key in keys])
    assert len(drawn.unique()) == 8 * len(keys) == 8 * 3072


@pytest.mark.parametrize("field", ["seed", "draw", "position"])
def test_key_takes_each_number_apart(field):
    assert len({Key(**{field: number}).stream() for number in range(10_000)}) == 10_000


def test_streams_that_split_off_share_no_word_with_each_other_nor_with_those_of_parts():
    """Two words of 64 bits are equal by chance with probability 1e-14."""
    key = Key(3)
    streams = [key.stream(), *(key.part(number).stream() for number in range(20))]
    streams += [split(key.stream(), 2**64 - 1 - number) for number in range(20)]
    drawn = torch.cat([random_words(stream, 0, 8) for stream in streams])
    assert len(drawn.unique()) == 8 * len(streams)


def test_name_is_no_part_of_the_stream():
    key = Key(1, 2, 3)
    assert key.at(3, "fc1.weight") == Key(1, 2, 3, name="fc1.weight")
    assert key.at(3, "fc1.weight").stream() == key.at(3, "fc2.weight").stream() == key.stream()
    assert key.at(4).stream() == Key(1, 2, 4).stream() != key.stream()


@pytest.mark.parametrize("field", ["seed", "draw", "position"])
@pytest.mark.parametrize("value", [-1, 1.0, "1", None, True])
def test_key_refuses_what_is_no_integer_of_at_least_zero(field, value):
    with pytest.raises(ValueError, match=f"{field} must be an integer >= 0, got {value!r}"):
        Key(**{field: value})


@pytest.mark.parametrize("wrong", [{"seed": 2**64}, {"purpose": "evaluated"}])
def test_key_refuses_what_would_share_a_stream(wrong):
    with pytest.raises(ValueError, match=r"must be below 2\^64|must have at most 8"):
        Key(**wrong)


def test_true_places_are_found_alike_without_numpy():
    mask = torch.tensor([False, True, True, False, True])
    elsewhere = SimpleNamespace(device=SimpleNamespace(type="cuda"), nonzero=mask.nonzero)
    assert torch.equal(where_true(elsewhere), where_true(mask))
    assert where_true(mask).tolist() == [1, 2, 4]
