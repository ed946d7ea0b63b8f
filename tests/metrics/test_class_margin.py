import math
from itertools import product

import pytest
import torch
from torch.testing import assert_close

from bnnft.metrics import ClassMargin, class_margin
from bnnft.nn import BinaryLinear


def integer_scores(samples=30, classes=5, seed=0):
    return torch.randint(-10, 11, (samples, classes), generator=torch.Generator().manual_seed(seed)).float()


def slow_margins(scores):
    """Return best minus second best score of one sample after the other."""
    margins = []
    for row in scores.double().tolist():
        best = max(row)
        rest = list(row)
        rest.remove(best)
        margins.append(best - max(rest))
    return margins


def measured(scores, fan_in, **kwargs):
    metric = ClassMargin(**kwargs)
    metric.update(scores, fan_in)
    return metric.compute()


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_class_margin_is_best_minus_second_best(classes):
    scores = integer_scores(classes=classes)
    assert_close(class_margin(scores).double(), torch.tensor(slow_margins(scores)).double())


def test_two_best_classes_leave_no_margin():
    assert class_margin(torch.tensor([[3.0, 3.0, 1.0]])).item() == 0


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 3, 2)])
def test_other_shapes_raise(shape):
    with pytest.raises(ValueError, match="scores must have shape"):
        class_margin(torch.zeros(shape))


def test_statistics_are_those_of_the_definition():
    margins = slow_margins(integer_scores())
    mean = math.fsum(margins) / len(margins)
    result = measured(integer_scores(), fan_in=10)
    assert result["class_margin"].item() == pytest.approx(mean)
    std = math.sqrt(math.fsum((m - mean) ** 2 for m in margins) / len(margins))
    assert result["class_margin_std"].item() == pytest.approx(std)


@pytest.mark.parametrize("fan_in", [10, 1])
def test_histogram_ends_at_the_largest_possible_margin(fan_in):
    """The margin of n binary inputs is at most 2 n; what is above (real inputs) counts in the last bin."""
    counts, edges = measured(integer_scores(), fan_in, bins=8)["class_margin_histogram"]
    expected = [0] * 8
    for m in slow_margins(integer_scores()):
        expected[min(7, int(m / (2 * fan_in) * 8))] += 1
    assert counts.tolist() == expected
    assert edges.tolist() == pytest.approx([2 * fan_in * b / 8 for b in range(9)])


def test_samples_with_scores_that_are_no_numbers_are_counted_apart():
    scores = integer_scores()
    scores[3, 0], scores[7, 1], scores[9] = math.nan, math.inf, -math.inf
    kept = [sample for sample in range(30) if sample not in (3, 7, 9)]
    result, expected = measured(scores, fan_in=10), measured(integer_scores()[kept], fan_in=10)
    assert result.pop("class_margin_nonfinite").item() == pytest.approx(3 / 30)
    assert result["class_margin"] == expected["class_margin"]
    assert torch.equal(result["class_margin_histogram"].counts, expected["class_margin_histogram"].counts)


def test_bins_below_1_raise():
    with pytest.raises(ValueError, match="bins"):
        ClassMargin(bins=0)


@pytest.mark.parametrize("seed", range(4))
def test_prediction_stands_under_fewer_than_half_the_margin_flips_and_no_more(seed):
    """All sets of flips of all weights of a last layer with 3 classes and 4 binary inputs."""
    generator = torch.Generator().manual_seed(seed)
    layer = BinaryLinear(4, 3, bias=False).requires_grad_(False)
    layer.weight.normal_(generator=generator)
    inputs = torch.tensor(list(product([1.0, -1.0], repeat=4)))
    clean = layer(inputs)
    masks = torch.tensor(list(product([1.0, -1.0], repeat=12)))
    flips = (masks < 0).sum(1)
    flipped = masks.view(-1, 3, 4) * layer.weight.sign()
    scores = torch.einsum("mci,ni->nmc", flipped, inputs)
    winner = clean.argmax(1)
    for sample, m in enumerate(class_margin(clean).tolist()):
        own = scores[sample, :, winner[sample]]
        others = scores[sample].clone()
        others[:, winner[sample]] = -math.inf
        lost = own <= others.amax(1)
        assert not lost[flips < m / 2].any()
        assert lost[flips == math.ceil(m / 2)].any()


def test_the_histogram_has_512_bins_unless_told_otherwise():
    counts, edges = measured(integer_scores(), fan_in=10)["class_margin_histogram"]
    assert len(counts) == 512
    assert edges[-1].item() == 20
