import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnnft.metrics import Histogram

filled = st.lists(st.integers(0, 9), min_size=1, max_size=40)


def histogram(counts):
    return Histogram(torch.tensor(counts), torch.linspace(0, len(counts) / 2, len(counts) + 1))


@given(counts=filled, bins=st.integers(1, 12))
def test_trimmed_counts_the_same_values_in_coarser_bins(counts, bins):
    whole, trimmed = histogram(counts), histogram(counts).trimmed(bins)
    assert len(trimmed.counts) <= bins
    assert len(trimmed.edges) == len(trimmed.counts) + 1
    places = [whole.edges.tolist().index(edge) for edge in trimmed.edges.tolist()]
    assert [sum(counts[a:b]) for a, b in pairwise(places)] == trimmed.counts.tolist()
    assert sum(counts) == trimmed.counts.sum()


@given(counts=filled)
def test_trimmed_shows_no_empty_end_if_bins_suffice(counts):
    trimmed = histogram(counts).trimmed(64)
    assert trimmed.counts[-1] > 0 or not any(counts)


@given(values=st.lists(st.floats(0, 19.99), min_size=1, max_size=60), level=st.floats(0.01, 0.99))
def test_quantile_lies_in_the_bin_of_the_exact_quantile(values, level):
    counts = torch.zeros(20, dtype=torch.int64)
    for value in values:
        counts[int(value)] += 1
    exact = sorted(values)[math.ceil(level * len(values) - 1e-6) - 1]
    got = Histogram(counts, torch.arange(21.0)).quantile(level).item()
    assert int(exact) - 1e-4 <= got <= int(exact) + 1 + 1e-4


@given(counts=filled.filter(any), level=st.floats(0.01, 0.99))
def test_this_share_lies_below_the_quantile(counts, level):
    """Counted with the values of a bin spread evenly over it."""
    whole = histogram(counts)
    quantile = whole.quantile(level).item()
    below = sum(count * min(1.0, max(0.0, 2 * quantile - place)) for place, count in enumerate(counts))
    assert below == pytest.approx(level * sum(counts), abs=1e-3)


def test_quantile_of_nothing_is_nan():
    assert histogram([0, 0]).quantile(0.5).isnan()


@pytest.mark.parametrize(("level", "value"), [(1.0, 1.5), (0.0, 0.5)])
def test_extreme_quantiles_are_the_ends_of_the_filled_bins(level, value):
    assert histogram([0, 2, 1, 0]).quantile(level).item() == value


def test_trimming_without_counts_shows_the_first_bin():
    trimmed = histogram([0, 0, 0, 0]).trimmed()
    assert trimmed.counts.tolist() == [0]
    assert trimmed.edges.tolist() == [0.0, 0.5]


def test_trimming_keeps_64_bins_unless_told_otherwise():
    assert len(histogram([1] * 64).trimmed().counts) == 64
    assert len(histogram([1] * 65).trimmed().counts) == 33
