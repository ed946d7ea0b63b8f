"""What is measured over bit error rates: accuracy, any torchmetrics metric, or a function that sums and counts."""

import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from bnnft.evaluation.answers import ClassAnswers, kind, pair
from bnnft.evaluation.curve import FRACTION
from bnnft.evaluation.tallies import Clones, Counts, Tally

if TYPE_CHECKING:  # importing it takes matplotlib along
    from torchmetrics import Metric

# What users give: see :func:`as_score`.
Correct = Callable[[nn.Module, Any], Tensor]
Predict = Callable[[nn.Module, Any], tuple[Any, ...] | Mapping[str, Any]]
SumAndCount = Callable[[nn.Module, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Score:
    """One score over BER.

    Attributes:
        name: in logs and figures.
        answers: runs a module on a batch and returns what the tally adds.
        tally: makes a tally of so many slots on a device.
        higher_is_better: ``None`` if that is not known.
        bounds: that the score can't leave.
    """

    name: str
    answers: Callable[[nn.Module, Any], Any]
    tally: Callable[[int, torch.device], Tally]
    higher_is_better: bool | None
    bounds: tuple[float, float]


def as_score(
    score: "Metric | SumAndCount | None" = None,
    predict: Predict | None = None,
    correct: Correct | None = None,
    higher_is_better: bool | None = None,
) -> Score:
    """Return the score that these arguments ask for, the accuracy of a classifier if there are none.

    Args:
        score: a torchmetrics metric, or ``score(model, batch)`` that returns a sum and a count of what it sums over,
            whose ratio over all batches is the score.
        predict: ``predict(model, batch)`` returns what the metric is updated with: a tuple ``(predictions, targets)``
            or a dict of keyword arguments. Without it batches are ``(inputs, targets)``, and predictions
            ``model(inputs)``.
        correct: ``correct(model, batch)`` returns a bool for each answer; the score is the share of right ones.
        higher_is_better: of ``score``; a metric says it itself.

    Raises:
        TypeError, ValueError: arguments that exclude each other, or of another type.

    Example:
        >>> from torchmetrics import MeanSquaredError
        >>> as_score().name, as_score(MeanSquaredError()).name, as_score(MeanSquaredError()).higher_is_better
        ('accuracy', 'mean_squared_error', False)
    """
    if predict is not None and not _is_metric(score):
        raise ValueError("predict= says what a torchmetrics metric is updated with: it needs score= to be one")
    if score is None:
        if higher_is_better not in (None, True):
            raise ValueError(f"higher_is_better is True for accuracy, got {higher_is_better!r}")
        right = partial(_class_answers, ClassAnswers()) if correct is None else partial(_right_answers, correct)
        return Score("accuracy", right, Counts, True, FRACTION)
    if correct is not None:
        raise ValueError("correct= and score= exclude each other: both say what is measured")
    if _is_metric(score):
        higher = score.higher_is_better if higher_is_better is None else higher_is_better
        tally = partial(Clones, score)
        return Score(
            score_name(score), partial(_predictions, predict or inputs_and_targets), tally, higher, _bounds(score)
        )
    if isinstance(score, type) or not callable(score) or type(score).__name__ == "MetricCollection":
        raise TypeError(
            f"score must be one torchmetrics Metric (an object) or a function of model and batch, got {score!r}"
        )
    sums = partial(Counts, dtype=torch.float64)
    return Score(score_name(score), partial(_sum_and_count, score), sums, higher_is_better, (-math.inf, math.inf))


def score_name(score: Any) -> str:
    """Return the name of a metric or a function in logs.

    Example:
        >>> from torchmetrics.segmentation import MeanIoU
        >>> score_name(MeanIoU(num_classes=2)), score_name(math.fsum), score_name(lambda model, batch: (1, 1))
        ('mean_iou', 'fsum', 'score')
    """
    while isinstance(score, partial):
        score = score.func
    name = getattr(score, "__name__", type(score).__name__)
    words = re.sub(r"(?<!^)(?=[A-Z][a-z0-9])|(?<=[a-z]{2})(?=[A-Z])", "_", name)
    return "score" if name == "<lambda>" else re.sub(r"\W+", "_", re.sub("_+", "_", words)).lower()


def _is_metric(score: Any) -> "TypeGuard[Metric]":
    library = sys.modules.get("torchmetrics")  # where nobody imported it there is no metric
    return library is not None and isinstance(score, library.Metric)


def _bounds(metric: "Metric") -> tuple[float, float]:
    """Return what the values of a metric stay within, as torchmetrics draws them."""
    low, high = metric.plot_lower_bound, metric.plot_upper_bound
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


def inputs_and_targets(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """Return predictions and targets of a batch ``(inputs, targets)``.

    Raises:
        ValueError: the batch is something else.
    """
    inputs, targets = pair(batch, f"score= needs batches (inputs, targets), or predict= for others, got {kind(batch)}")
    return model(inputs), targets


def _class_answers(answers: ClassAnswers, model: nn.Module, batch: Any) -> tuple[Tensor, int, Tensor]:
    right, answered = answers(model, batch)
    return right.sum(), right.numel(), answered.logical_not().sum()


def _right_answers(correct: Correct, model: nn.Module, batch: Any) -> tuple[Tensor, int, int]:
    right: Any = correct(model, batch)
    if not isinstance(right, Tensor) or right.dtype != torch.bool:
        raise ValueError(f"correct must return a bool for each answer, as a tensor, got {kind(right)}")
    return right.sum(), right.numel(), 0


def _sum_and_count(score: SumAndCount, model: nn.Module, batch: Any) -> tuple[Any, Any, int]:
    wanted = "score must return a sum and a count, two numbers, the count an integer >= 0"
    result: Any = score(model, batch)
    total, count = pair(result, f"{wanted}, got {kind(result)}")
    for number in (total, count):
        if not (isinstance(number, Real) or (isinstance(number, Tensor) and number.numel() == 1)):
            raise ValueError(f"{wanted}, got {kind(total)} and {kind(count)}")
    if not float(count).is_integer() or count < 0:
        raise ValueError(f"{wanted}, got the count {float(count)!r}")
    return (total.detach().reshape(()) if isinstance(total, Tensor) else total), int(count), 0


def _predictions(predict: Predict, model: nn.Module, batch: Any) -> Any:
    answers: Any = predict(model, batch)
    if not isinstance(answers, tuple | list | Mapping):
        raise ValueError(
            f"predict must return (predictions, targets) or a dict of keyword arguments, got {kind(answers)}"
        )
    return answers
