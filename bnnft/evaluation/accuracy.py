"""Accuracy or another score over bit error rate, measured: fault maps at several rates, in one pass over the data."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bnnft.ber import ErrorModel
from bnnft.compensation.method import Method
from bnnft.evaluation.compensated_maps import fault_maps
from bnnft.evaluation.curve import BERCurve
from bnnft.evaluation.maps import Flipping
from bnnft.evaluation.meter import ScoreMeter
from bnnft.evaluation.points import curve_axis, error_models
from bnnft.evaluation.scores import Correct, Predict, SumAndCount, as_score
from bnnft.injection.activation import Target
from bnnft.injection.places import How
from bnnft.injection.sites import Weights

if TYPE_CHECKING:  # importing it takes matplotlib along
    from torchmetrics import Metric


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
    rates: Iterable[float] | None = None,
    maps: int = 5,
    seed: int = 0,
    *,
    error_model: float | ErrorModel | None = None,
    axis: str | None = None,
    weights: Weights | None = None,
    target: Target = "weights",
    activations: Sequence[str] | None = None,
    how: How = "auto",
    correct: Correct | None = None,
    score: "Metric | SumAndCount | None" = None,
    predict: Predict | None = None,
    higher_is_better: bool | None = None,
    compensation: str | Sequence[str] | Method | None = None,
) -> BERCurve:
    """Measure a classifier's accuracy over bit error rates, or another score, in eval mode and one pass over the data.

    Args:
        model: any module with binarized weights, of known layers or not (those are found in the first batch).
        dataloader: yields batches ``(inputs, targets)``, which are moved to the device of the weights; the model
            returns class scores of shape (N, C, ...), targets are integers of shape (N, ...).
        rates: strictly ascending bit error rates in [0, 1]; values of another parameter from the fewest errors to the
            most; the points of the error model if ``None``.
        maps: fault maps at each rate, >= 1. A map is shared by all samples, as in a memory.
        seed: of the fault maps, >= 0. Map ``m`` uses the same random numbers at every rate.
        error_model: whose parameter ``axis`` takes the rates; independent flips if ``None``.
        axis: the parameter of the error model that ``rates`` sets; the error model's own axis if ``None``.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.
        target: flip ``"weights"``, ``"activations"`` (anew in each batch) or ``"both"``.
        activations: patterns of names, see :func:`bnnft.flipped`.
        how: where bits are flipped, see there.
        correct: for other batches or answers: ``correct(model, batch)`` returns a bool for each answer.
        score: for other scores: a torchmetrics metric or a function, see :func:`bnnft.evaluation.scores.as_score`.
        predict: what the metric is updated with, see there.
        higher_is_better: of a score that is a function; a metric says it itself.
        compensation: of the errors, see :class:`bnnft.compensation.Method`: a kind, several kinds, or a method.

    Returns:
        The curve, with the clean score. Model, training mode and random streams are as before.

    Raises:
        TypeError, ValueError: an argument is out of range, the model has no such weights, or its answers do not suit.

    Example:
        >>> from bnnft.nn import BinaryLinear
        >>> model, x = BinaryLinear(64, 4, bias=False), torch.randn(256, 64).sign()
        >>> curve = accuracy_over_ber(model, [(x, model(x).argmax(1))], rates=[0, 0.5], maps=3)
        >>> curve.mean[0], curve.mean[1] < 0.5
        (1.0, True)
    """
    axis, points = curve_axis(rates, error_model, axis)
    models = error_models(points, error_model, axis)
    flipping = Flipping(seed, weights, target, activations, how, compensation)
    measured = as_score(score, predict, correct, higher_is_better)
    meter = ScoreMeter(measured, fault_maps(model, models, maps, flipping))
    return _curve_of(meter, model, dataloader, points, axis)


def _curve_of(
    meter: ScoreMeter, model: nn.Module, dataloader: Iterable[Any], points: Sequence[float], axis: str
) -> BERCurve:
    """Return the curve that a meter measures of a model, and say what is to be remarked on it."""
    device = meter.maps.device
    # a loader draws from torch's generator when its iteration starts
    with _in_eval_mode(model), torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for batch in dataloader:
            meter.update(tree_map_only(Tensor, lambda tensor: tensor.to(device), batch))
        curve = meter.curve(points, axis)
    if meter.remark:
        warnings.warn(f"accuracy_over_ber: {meter.remark}", stacklevel=3)
    return curve
