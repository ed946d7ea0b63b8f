import math

import pytest
import torch
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

from bnnft.evaluation.tallies import Clones, Counts


def test_counts_are_exact_beyond_what_floats_hold():
    """2^24 + 1 is no float32, 2^53 + 1 no float64."""
    counts = Counts(1)
    for right in (2**53, 1):
        counts.add(0, (right, 2**53, 0))
    assert (counts.sums.dtype, counts.counts.dtype) == (torch.int64, torch.int64)
    assert (int(counts.sums[0]), int(counts.counts[0])) == (2**53 + 1, 2**54)


def test_counts_merge_with_those_of_a_process_without_data():
    ours, theirs = Counts(2, dtype=torch.float64), Counts(2, dtype=torch.float64)
    ours.add(0, (1.5, 2, 1))
    ours.add(1, (4.0, 4, 0))
    other = iter((theirs.sums, theirs.counts, theirs.lost))
    ours.merge(lambda tensor: tensor + next(other))
    assert ours.values().tolist() == [0.75, 1.0]
    assert not ours.empty
    ours_of_them = iter((ours.sums, ours.counts, ours.lost))
    assert theirs.empty
    theirs.merge(lambda tensor: tensor + next(ours_of_them))
    assert not theirs.empty
    assert theirs.values().tolist() == [0.75, 1.0]
    assert theirs.remark == "1 of 6 answers under all maps count as wrong: their highest score is not finite"


def test_nothing_is_no_score():
    assert math.isnan(Counts(1).values()[0])
    assert Counts(1).remark == ""


def test_memory_of_counts_does_not_grow():
    counts = Counts(3)
    before = [tensor.data_ptr() for tensor in (counts.sums, counts.counts, counts.lost)]
    for _ in range(100):
        counts.add(1, (torch.tensor(3), 5, 0))
    assert [tensor.data_ptr() for tensor in (counts.sums, counts.counts, counts.lost)] == before


def test_each_slot_has_a_clone_of_its_own_and_the_metric_stays():
    metric = MeanSquaredError()
    metric.update(torch.ones(1), torch.zeros(1))
    clones = Clones(metric, 3)
    for slot, error in enumerate((0.0, 2.0, 3.0)):
        clones.add(slot, (torch.full((4,), error), torch.zeros(4)))
    clones.add(2, {"preds": torch.zeros(4), "target": torch.zeros(4)})
    assert clones.values().tolist() == [0, 4, 4.5]
    assert float(metric.compute()) == 1


def test_predictions_that_are_no_numbers_are_remarked():
    clones = Clones(MulticlassAccuracy(3), 1)
    clones.add(0, (torch.eye(3), torch.arange(3)))
    assert clones.remark == ""
    clones.add(0, {"preds": torch.full((3, 3), torch.nan), "target": torch.arange(3)})
    assert clones.remark == "predictions of 1 batches under all maps hold NaN"


def test_a_metric_of_several_values_is_no_score():
    clones = Clones(MulticlassAccuracy(3, average=None), 1)
    clones.add(0, (torch.eye(3), torch.arange(3)))
    with pytest.raises(ValueError, match=r"score must compute one number, but .*Accuracy computes values of shape"):
        clones.values()


def test_processes_merge_where_they_are_to(monkeypatch):
    """A metric that is measured by one process alone asks no other one, or it would wait for ever."""
    clones = Clones(MeanSquaredError() + MeanSquaredError(), 1)
    parts = [part for part in clones.metrics[0].modules() if hasattr(part, "distributed_available_fn")]
    assert len(parts) == 3
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert not any(part.distributed_available_fn() for part in parts)
    clones.merge(lambda tensor: tensor)
    assert all(part.distributed_available_fn() for part in parts)
