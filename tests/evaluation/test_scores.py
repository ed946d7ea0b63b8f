import math
from functools import partial

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric, MeanSquaredError, R2Score
from torchmetrics.classification import BinaryF1Score, MulticlassAUROC
from torchmetrics.segmentation import MeanIoU
from torchmetrics.text import Perplexity

from bnnft.evaluation.scores import as_score, score_name

BATCH = (torch.ones(4, 2), torch.tensor([0, 1, 1, 0]))


def a_sum(model, batch):
    return 3.0, 4


class AnObject:
    def __call__(self, model, batch):
        return 1, 1


@pytest.mark.parametrize(
    ("score", "name"),
    [
        (MeanSquaredError(), "mean_squared_error"),
        (MeanIoU(2), "mean_iou"),
        (BinaryF1Score(), "binary_f1_score"),
        (MulticlassAUROC(3), "multiclass_auroc"),
        (R2Score(), "r2_score"),
        (a_sum, "a_sum"),
        (partial(a_sum), "a_sum"),
        (lambda model, batch: (1, 1), "score"),
        (AnObject(), "an_object"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_score_is_called_by_what_it_is_and_never_by_where_it_lies(score, name):
    assert score_name(score) == name


@pytest.mark.parametrize(
    ("score", "higher", "bounds"),
    [
        (None, True, (0, 1)),
        (MeanSquaredError(), False, (0, math.inf)),
        (MulticlassAUROC(3), True, (0, 1)),
        (Perplexity(), False, (-math.inf, math.inf)),
        (MeanMetric(), None, (-math.inf, math.inf)),
        (a_sum, None, (-math.inf, math.inf)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_direction_and_bounds_are_those_of_the_metric(score, higher, bounds):
    found = as_score(score)
    assert found.higher_is_better is higher
    assert found.bounds == bounds


@pytest.mark.parametrize("score", [a_sum, MeanMetric(), MeanSquaredError()], ids=lambda score: type(score).__name__)
@pytest.mark.parametrize("higher", [True, False])
def test_a_direction_that_is_given_wins(score, higher):
    assert as_score(score, higher_is_better=higher).higher_is_better is higher


@pytest.mark.parametrize("right", [torch.ones(4), torch.ones(4, dtype=torch.int64), 0.5, [True, False], None], ids=str)
def test_correct_must_say_it_of_each_answer(right):
    with pytest.raises(ValueError, match="correct must return a bool for each answer, as a tensor, got"):
        as_score(correct=lambda model, batch: right).answers(nn.Identity(), BATCH)


@pytest.mark.parametrize(
    ("result", "added"),
    [
        ((3.0, 4), (3.0, 4)),
        ([3, 4.0], (3, 4)),
        ((torch.tensor([3.0]), torch.tensor(4)), (3.0, 4)),
        ((torch.tensor(3.0), 0), (3.0, 0)),
    ],
    ids=str,
)
def test_a_function_returns_a_sum_and_a_count(result, added):
    total, count, lost = as_score(lambda model, batch: result).answers(nn.Identity(), BATCH)
    assert (float(total), count, lost) == (*added, 0)


@pytest.mark.parametrize(
    "result",
    [3.0, torch.tensor(3.0), (1, 2, 3), (torch.ones(2), 2), (1.0, "2"), (1.0, 2.5), (1.0, -1), (1.0, math.nan), None],
    ids=str,
)
def test_what_is_no_sum_and_count_is_an_error(result):
    with pytest.raises(ValueError, match="score must return a sum and a count"):
        as_score(lambda model, batch: result).answers(nn.Identity(), BATCH)


def test_a_metric_gets_predictions_and_targets_unless_told_otherwise():
    predictions, targets = as_score(MeanSquaredError()).answers(nn.Flatten(), BATCH)
    assert predictions is not None
    assert torch.equal(predictions, BATCH[0])
    assert targets is BATCH[1]
    with pytest.raises(ValueError, match=r"score= needs batches \(inputs, targets\), or predict= for others, got dict"):
        as_score(MeanSquaredError()).answers(nn.Identity(), {"x": 1})


@pytest.mark.parametrize("result", [torch.ones(3), None, 2.0], ids=str)
def test_predict_returns_arguments(result):
    with pytest.raises(ValueError, match=r"predict must return \(predictions, targets\) or a dict"):
        as_score(MeanSquaredError(), predict=lambda model, batch: result).answers(nn.Identity(), BATCH)
