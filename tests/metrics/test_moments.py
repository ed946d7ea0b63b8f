import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnnft.metrics.moments import MomentsMetric


class Moments(MomentsMetric):
    def update(self, values):
        self._add(values)

    def compute(self):
        return self._mean_and_std()


def reference(values):
    """Return mean and population standard deviation, in exact sums."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def moments(batches):
    metric = Moments()
    for batch in batches:
        metric.update(torch.tensor(batch))
    return [value.item() for value in metric.compute()]


streams = st.lists(st.lists(st.floats(-100, 100, width=32), max_size=6), min_size=1, max_size=6).filter(any)


@given(batches=streams)
def test_any_split_gives_mean_and_std_of_all_values(batches):
    assert moments(batches) == pytest.approx(reference([v for batch in batches for v in batch]), rel=1e-4, abs=1e-3)


@given(batches=streams, cut=st.integers(0, 6))
def test_merged_metrics_give_mean_and_std_of_all_values(batches, cut):
    first, second = Moments(), Moments()
    for metric, part in ((first, batches[:cut]), (second, batches[cut:])):
        for batch in [[], *part]:
            metric.update(torch.tensor(batch))
    first.merge_state(second)
    expected = reference([v for batch in batches for v in batch])
    assert [value.item() for value in first.compute()] == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_small_spread_far_from_zero_keeps_its_digits():
    """A sum of squares in float32 would lose a spread of 1 at an offset of 10,000 (1e8 has a resolution of 8)."""
    values = (10_000 + torch.randn(50, 40, generator=torch.Generator().manual_seed(0))).tolist()
    expected = reference([v for batch in values for v in batch])
    assert moments(values) == pytest.approx(expected, rel=1e-3)


def test_nothing_taken_in_gives_nan():
    assert all(math.isnan(value) for value in moments([[]]))


def test_constant_values_have_no_spread():
    assert moments([[3.0], [3.0, 3.0]]) == [3.0, 0.0]


def test_count_is_an_integer_of_64_bits():
    metric = Moments()
    metric.update(torch.ones(3))
    assert (metric.count.dtype, metric.count.item()) == (torch.int64, 3)


def test_states_have_the_same_shapes_with_and_without_values():
    """A process that saw no value must merge with one that did."""
    empty, filled = Moments(), Moments()
    filled.update(torch.ones(3))
    shapes = [{name: state.shape for name, state in metric.metric_state.items()} for metric in (empty, filled)]
    assert shapes[0] == shapes[1] == {"count": (1,), "mean": (1,), "m2": (1,)}
    filled.merge_state(empty)
    assert [value.item() for value in filled.compute()] == [1.0, 0.0]
