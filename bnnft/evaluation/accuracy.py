"""Accuracy or another score over bit error rate, measured: fault maps at several rates, in one pass over the data."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bnnft.ber import ErrorModel, Independent, at_rate, has_field
from bnnft.evaluation.curve import BERCurve
from bnnft.evaluation.maps import FaultMaps, Flipping
from bnnft.evaluation.meter import ScoreMeter
from bnnft.evaluation.scores import Correct, Predict, SumAndCount, as_score
from bnnft.injection.activation import Target
from bnnft.injection.sites import Weights

if TYPE_CHECKING:  # importing it takes matplotlib along
    from torchmetrics import Metric


def error_models(rates: Sequence[float], error_model: ErrorModel | None = None, axis: str = "rate") -> list[ErrorModel]:
    """Return the error model once for each value of one of its parameters.

    Args:
        rates: strictly ascending rates, or values of another parameter, from the fewest errors to the most.
        error_model: independent flips if ``None``.
        axis: the parameter; ``"rate"`` for all error models that have a rate, if only the mean of several.

    Raises:
        TypeError, ValueError: no rates, not in order, or out of range; the error model has no such parameter.

    Example:
        >>> error_models([0, 0.1])
        [Independent(rate=0.0), Independent(rate=0.1)]
    """
    template: Any = Independent(0.0) if error_model is None else error_model
    if not has_field(template, axis) and not (axis == "rate" and hasattr(template, "at_rate")):
        raise ValueError(f"axis must name a parameter of the error model {template!r}, got {axis!r}")
    down = all(b < a for a, b in pairwise(rates)) and axis != "rate"
    if not len(rates) or not (down or all(b > a for a, b in pairwise(rates))):
        raise ValueError(f"rates must be a list of one or more strictly ascending numbers, got {list(rates)!r}")
    models = [at_rate(template, rate) if axis == "rate" else replace(template, **{axis: rate}) for rate in rates]
    growing = [getattr(model, "rate", 0) for model in models]
    if any(b < a for a, b in pairwise(growing)):
        raise ValueError(f"rates must go from the fewest errors to the most, got {list(rates)!r} for axis {axis!r}")
    return models


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def accuracy_over_ber(
    model: nn.Module,
    dataloader: Iterable[Any],
    rates: Sequence[float],
    maps: int = 5,
    seed: int = 0,
    *,
    error_model: ErrorModel | None = None,
    axis: str = "rate",
    weights: Weights | None = None,
    target: Target = "weights",
    activations: Sequence[str] | None = None,
    correct: Correct | None = None,
    score: "Metric | SumAndCount | None" = None,
    predict: Predict | None = None,
    higher_is_better: bool | None = None,
) -> BERCurve:
    """Measure a classifier's accuracy over bit error rates, or another score, in eval mode and one pass over the data.

    Args:
        model: any module with binarized weights, of known layers or not (those are found in the first batch).
        dataloader: yields batches ``(inputs, targets)``, which are moved to the device of the weights; the model
            returns class scores of shape (N, C, ...), targets are integers of shape (N, ...).
        rates: strictly ascending bit error rates in [0, 1]; values of another parameter from the fewest errors to the
            most.
        maps: fault maps at each rate, >= 1. A map is shared by all samples, as in a memory.
        seed: of the fault maps, >= 0. Map ``m`` uses the same random numbers at every rate.
        error_model: whose parameter ``axis`` takes the rates; independent flips if ``None``.
        axis: the parameter of the error model that ``rates`` sets.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.
        target: flip ``"weights"``, ``"activations"`` (anew in each batch) or ``"both"``.
        activations: patterns of names, see :func:`bnnft.injection.activation.find_activations`.
        correct: for other batches or answers: ``correct(model, batch)`` returns a bool for each answer.
        score: for other scores: a torchmetrics metric, of which each map gets a clone, or ``score(model, batch)`` that
            returns a sum and a count, whose ratio is the score.
        predict: ``predict(model, batch)`` returns what the metric is updated with, a tuple ``(predictions, targets)``
            or a dict of keyword arguments; ``(model(inputs), targets)`` if ``None``.
        higher_is_better: of a score that is a function; a metric says it itself.

    Returns:
        The curve, with the clean score. Model, training mode and random streams are as before.

    Raises:
        TypeError, ValueError: an argument is out of range, the model has no such weights, or its answers are not those
            that the score is taken of.

    Example:
        >>> from bnnft.nn import BinaryLinear
        >>> model, x = BinaryLinear(64, 4, bias=False), torch.randn(256, 64).sign()
        >>> data = [(x, model(x).argmax(1))]
        >>> curve = accuracy_over_ber(model, data, rates=[0, 0.5], maps=3)
        >>> curve.mean[0], curve.mean[1] < 0.5
        (1.0, True)
    """
    models = error_models(rates, error_model, axis)
    flipping = Flipping(seed, weights, target, activations)
    measured = as_score(score, predict, correct, higher_is_better)
    meter = ScoreMeter(measured, FaultMaps(model, models, maps, flipping))
    device = meter.maps.device
    # a loader draws from torch's generator when its iteration starts
    with _in_eval_mode(model), torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for batch in dataloader:
            meter.update(tree_map_only(Tensor, lambda tensor: tensor.to(device), batch))
    if meter.remark:
        warnings.warn(f"accuracy_over_ber: {meter.remark}", stacklevel=2)
    return meter.curve(rates, axis)
