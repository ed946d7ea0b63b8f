"""Accuracy over BER in closed form: no fault map is drawn, one propagation of moments stands for all."""

import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bnnft.ber import ErrorModel, Independent, as_error_model, checked_bit_rates
from bnnft.compensation import Method, as_method
from bnnft.compensation.compensator import Compensator
from bnnft.evaluation.answers import ClassAnswers, kind, pair
from bnnft.evaluation.curve import BERCurve
from bnnft.evaluation.moments import Errors, probability_of_class
from bnnft.evaluation.points import curve_axis, error_models
from bnnft.evaluation.propagation import Propagation
from bnnft.evaluation.tallies import Reduce
from bnnft.injection.finder import Finder
from bnnft.injection.sites import Site, Weights, binarized_weights, first_names
from bnnft.tracing.state import unchanged
from bnnft.tracing.trace import Trace

_NO_ERRORS = Independent(0.0)
_FEW_INPUTS = 64  # of a neuron, whose sums are no Gaussians


def predict_accuracy_over_ber(
    model: nn.Module,
    dataloader: Iterable[Any],
    rates: Iterable[float] | None = None,
    *,
    error_model: float | ErrorModel | None = None,
    axis: str | None = None,
    weights: Weights | None = None,
    compensation: str | Sequence[str] | Method | None = None,
) -> BERCurve:
    """Predict a classifier's accuracy over bit error rates, the mean over fault maps, without drawing any.

    Mean and variance of every sum are propagated through linear layers, batch norms, signs and sums of branches, as
    :mod:`bnnft.evaluation.moments` derives it, and class scores are independent Gaussians in the end. One forward for
    each rate takes the place of one for each map. For independent errors: of clustered ones a mean says little.

    Args:
        model: any module whose binarized weights are those of linear layers.
        dataloader: yields batches ``(inputs, targets)``, as of :func:`bnnft.accuracy_over_ber`.
        rates: of the errors, see there.
        error_model: that says its rates, see there.
        axis: of the error model, see there.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.
        compensation: of the errors, see :class:`bnnft.compensation.Method`; recalibration can't be predicted.

    Returns:
        The curve, with one value for each rate, and the clean accuracy. Model, modes and random streams are as before.

    Raises:
        TypeError, ValueError: an argument is out of range; something has no closed form, a convolution, say.

    Source: derived in :mod:`bnnft.evaluation.moments`; Gaussian sums as of mean field theory.

    Example:
        >>> from bnnft.nn import BinaryLinear
        >>> model, x = BinaryLinear(256, 4, bias=False), torch.randn(64, 256).sign()
        >>> curve = predict_accuracy_over_ber(model, [(x, model(x).argmax(1))], rates=[0, 0.1, 0.5])
        >>> curve.mean[0], 0.5 < curve.mean[1] < 1, round(curve.mean[2], 2)
        (1.0, True, 0.25)
    """
    axis, points = curve_axis(rates, error_model, axis)
    models = error_models(points, error_model, axis)
    meter = PredictionMeter(model, models, weights, compensation)
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    with torch.random.fork_rng([]):  # a loader draws from torch's generator when its iteration starts
        for batch in dataloader:
            meter.update(tree_map_only(Tensor, lambda tensor: tensor.to(device), batch))
    return meter.curve(points, axis)


def predicted_accuracy(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    error_model: float | ErrorModel,
    *,
    weights: Weights | None = None,
    compensation: str | Sequence[str] | Method | None = None,
) -> Tensor:
    """Return for each sample the predicted probability of the right answer; gradients flow to weights and batch norms.

    Args:
        model: in eval mode, with linear binarized layers.
        inputs: of the model.
        targets: classes, shape (N, ...).
        error_model: a bit error rate, or an error model that says its rates.
        weights: see :func:`predict_accuracy_over_ber`.
        compensation: see there.

    Example:
        >>> from bnnft.nn import BinaryLinear
        >>> model = BinaryLinear(64, 4, bias=False)
        >>> loss = 1 - predicted_accuracy(model, torch.randn(8, 64), torch.zeros(8, dtype=torch.int64), 0.1).mean()
        >>> loss.backward()
        >>> bool(model.weight.grad.any())
        True
    """
    predictor = Predictor(model, weights, compensation)
    moments = predictor.propagation(inputs).moments(predictor.errors(as_error_model(error_model)))
    return probability_of_class(moments, targets)


class PredictionMeter:
    """Predicts a classifier's accuracy under several error models, batch by batch; leaves the model as it is.

    Args:
        model: any module whose binarized weights are those of linear layers.
        models: one error model for each point of the curve.
        weights: patterns or a function that select weights.
        compensation: of the errors.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        models: Sequence[ErrorModel],
        weights: Weights | None = None,
        compensation: str | Sequence[str] | Method | None = None,
    ) -> None:
        self._model, self._models = model, models
        self._predictor, self._answers = Predictor(model, weights, compensation), ClassAnswers()
        self._right = torch.zeros(2 + len(models), dtype=torch.float64)  # last the number of answers

    def update(self, batch: Any) -> None:
        """Predict the answers of a batch ``(inputs, targets)``.

        Raises:
            ValueError: something has no closed form, or the answers do not suit.
        """
        inputs, targets = pair(batch, f"a prediction needs batches (inputs, targets), got {kind(batch)}")
        with unchanged(self._model), torch.no_grad():
            self._model.eval()
            propagation = self._predictor.propagation(inputs)
            scores = propagation.moments(self._predictor.errors(_NO_ERRORS)).mean
            found = [self._answers(nn.Identity(), (scores, targets))[0].sum()]
            for each in self._models:
                moments = propagation.moments(self._predictor.errors(each))
                found.append(probability_of_class(moments, targets).sum())
        self._right += torch.tensor([*(float(right) for right in found), targets.numel()], dtype=torch.float64)

    def merge(self, reduce: Reduce) -> None:
        """Put together what all processes predicted; ``reduce`` returns the sum of a tensor over processes."""
        self._right = reduce(self._right)

    def curve(self, points: Sequence[float], axis: str = "rate", name: str = "") -> BERCurve:
        """Return the curve of everything predicted so far.

        Raises:
            ValueError: nothing was predicted.
        """
        if not self._right[-1]:
            raise ValueError("accuracy over BER needs data, but got no batch")
        values = (self._right / self._right[-1])[:-1]
        return BERCurve(tuple(points), values[1:, None], float(values[0]), axis, name=name)


class Predictor:
    """Propagates moments through a model, batch by batch.

    Args:
        model: in eval mode.
        weights: patterns or a function that select weights.
        compensation: of the errors; recalibration can't be predicted.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Weights | None = None,
        compensation: str | Sequence[str] | Method | None = None,
    ) -> None:
        binarized_weights(model, weights)  # raises for a pattern that matches nothing
        self._model, self._weights = model, weights
        self._sites: list[Site] | None = None
        self._compensator: Compensator | None = None
        if compensation is not None:
            method = as_method(compensation)
            if method.recalibrates:
                raise ValueError("recalibration gathers statistics from samples under errors: it can't be predicted")
            self._compensator = Compensator(model, method, weights)

    def propagation(self, inputs: Any) -> Propagation:
        """Trace a batch of inputs."""
        forward = partial(self._model, inputs)
        if self._sites is None:
            self._sites = self._found(forward)
            if self._compensator is not None:
                self._compensator.look(forward)
        trace = Trace(self._model)
        with trace:
            output = forward()
        if trace.error is not None:
            raise RuntimeError(f"the forward could not be traced: {trace.error}") from trace.error
        return Propagation(trace, output, self._sites)

    def errors(self, error_model: ErrorModel) -> dict[str, Errors]:
        """Return what each weight's bits suffer under an error model, and how its sums are corrected."""
        assert self._sites is not None
        corrections = {} if self._compensator is None else self._compensator.corrections(error_model)
        found = {}
        for site in self._sites:
            own = [each for each in corrections.get(site.layer, ()) if each.size == site.weight.numel()]
            found[site.name] = Errors(checked_bit_rates(error_model, site.name), own[0] if own else None)
        return found

    def _found(self, forward: Any) -> list[Site]:
        finder = Finder(self._model, self._weights)
        with unchanged(self._model), torch.no_grad(), finder:
            forward()
        first = first_names(self._model)
        sites = [site for site in finder.findings.sites() if first[site.name] in finder.findings.uses]
        coarse = {site.layer: site.fan_in for site in sites if 0 < site.fan_in < _FEW_INPUTS}
        if coarse:
            shown = ", ".join(f"{layer} ({fan_in})" for layer, fan_in in coarse.items())
            warnings.warn(f"the prediction is coarse where neurons have few inputs: {shown}", stacklevel=2)
        return sites
