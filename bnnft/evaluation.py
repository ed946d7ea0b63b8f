"""Accuracy over bit error rate, measured: fault maps at several rates, in one pass over the data."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bnnft.ber import ErrorModel, Independent, Key
from bnnft.injection import TurnedBits, draw_flips
from bnnft.operands import OperandWatch
from bnnft.plots import Plot, plot_curve
from bnnft.sites import Site, Weights, binarized_weights, no_sites, watched_sites


@dataclass(frozen=True, eq=False)
class BERCurve:
    """Accuracy at several bit error rates, each under several fault maps.

    Attributes:
        rates: the tested rates, ascending (or the values of another parameter of the error model, see ``axis``).
        accuracy: float64, shape (rates, maps), fractions in [0, 1].
        clean: accuracy without flips.
        axis: name of the parameter that ``rates`` holds.

    Example:
        >>> import torch
        >>> accuracy = torch.tensor([[0.9, 0.9], [0.88, 0.90], [0.5, 0.6]], dtype=torch.float64)
        >>> curve = BERCurve((0.0, 0.1, 0.2), accuracy, clean=0.9)
        >>> [round(mean, 3) for mean in curve.mean], round(curve.tolerable_ber(drop=0.1), 3)
        ([0.9, 0.89, 0.55], 0.126)
    """

    rates: tuple[float, ...]
    accuracy: Tensor
    clean: float
    axis: str = "rate"

    @property
    def maps(self) -> int:
        """Number of fault maps at each rate."""
        return self.accuracy.shape[1]

    @property
    def mean(self) -> list[float]:
        """Mean over fault maps, one value a rate."""
        return [float(mean) for mean in self.accuracy.mean(1)]

    @property
    def std(self) -> list[float]:
        """Sample standard deviation over fault maps, NaN for a single map."""
        if self.maps < 2:
            return [math.nan] * len(self.rates)
        return [float(std) for std in self.accuracy.std(1)]

    @property
    def interval(self) -> list[tuple[float, float]]:
        """95 % confidence interval of the mean over maps (Student's t), NaN for a single map."""
        return [interval(maps) for maps in self.accuracy]

    def tolerable_ber(self, drop: float = 0.01) -> float:
        """Return the highest rate up to which the mean accuracy stays within ``drop`` of the clean accuracy.

        Between tested rates the mean is interpolated linearly. If no tested rate falls below, the result is the
        highest tested one: a lower bound.

        Raises:
            ValueError: ``drop`` is no fraction in [0, 1].
        """
        checked_drop(drop)
        floor = self.clean - drop - 1e-12  # a drop of exactly the stated size is within it
        below, above = 0.0, self.clean
        for rate, mean in zip(self.rates, self.mean, strict=True):
            if mean < floor:
                return below + (rate - below) * (above - floor) / (above - mean)
            below, above = rate, mean
        return self.rates[-1]

    def plot(self, ax: Any = None, label: str | None = None) -> Plot:
        """Draw mean and 95 % interval over the rates; returns (figure, axes)."""
        return plot_curve(self.rates, self.mean, self.interval, ax, label, self.axis)


def interval(values: Tensor) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean of some values (Student's t), NaN for a single one."""
    if len(values) < 2:
        return math.nan, math.nan
    mean, half = float(values.mean()), student(len(values) - 1) * float(values.std()) / math.sqrt(len(values))
    return mean - half, mean + half


@cache
def student(freedom: int) -> float:
    """Return the 0.975 quantile of Student's t with so many degrees of freedom."""
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))


def checked_drop(drop: float) -> None:
    """Raise ValueError unless the tolerated drop of accuracy is a fraction in [0, 1]."""
    if not 0 <= drop <= 1:
        raise ValueError(f"drop must be a fraction in [0, 1], got {drop!r}")


def error_models(rates: Sequence[float], error_model: ErrorModel | None = None, axis: str = "rate") -> list[ErrorModel]:
    """Return the error model once for each value of one of its parameters.

    Raises:
        ValueError: no rates, or not strictly ascending; the error model has no such parameter.

    Example:
        >>> error_models([0, 0.1])
        [Independent(rate=0.0), Independent(rate=0.1)]
    """
    if not len(rates) or any(b <= a for a, b in pairwise(rates)):
        raise ValueError(f"rates must be a list of one or more strictly ascending numbers, got {list(rates)!r}")
    template: Any = Independent(0.0) if error_model is None else error_model
    if axis not in getattr(template, "__dataclass_fields__", {}):
        raise ValueError(f"axis must name a parameter of the error model {template!r}, got {axis!r}")
    return [replace(template, **{axis: rate}) for rate in rates]


class AccuracyMeter:
    """Counts right answers under every fault map, batch by batch.

    The flips of all maps are drawn once, at construction. Without a flip a map costs nothing: it is the clean run.

    Args:
        sites: the weights to turn.
        models: one error model for each point of the curve.
        maps: fault maps at each point, >= 1.
        seed: of the maps; map ``m`` is ``draw=m`` of :func:`bnnft.flipped`.
        model: that the sites belong to.
    """

    def __init__(
        self, sites: Sequence[Site], models: Sequence[ErrorModel], maps: int, seed: int, model: nn.Module
    ) -> None:
        checked_maps(maps)
        self.sites, self.model = sites, model
        self.flips = [[draw_flips(sites, model, Key(seed, draw)) for draw in range(maps)] for model in models]
        device = sites[0].weight.device
        self.right = torch.zeros(len(models), maps, dtype=torch.int64, device=device)
        self.clean_right = torch.zeros((), dtype=torch.int64, device=device)
        self.total = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, correct: Callable[[], Tensor]) -> None:
        """Run one batch clean and under every map.

        Args:
            correct: runs the model on the batch and returns for each answer whether it is right, as bool.
        """
        right = correct()
        self.total += right.numel()
        clean = right.sum()
        self.clean_right += clean
        for point, maps in enumerate(self.flips):
            for number, flips in enumerate(maps):
                if all(indices.numel() == 0 for indices in flips.values()):
                    self.right[point, number] += clean
                    continue
                turned = TurnedBits(self.sites, flips, model=self.model)
                try:
                    self.right[point, number] += correct().sum()
                finally:
                    turned.restore()

    def curve(self, rates: Sequence[float], axis: str = "rate") -> BERCurve:
        """Return the accuracies of everything counted so far."""
        accuracy = self.right.cpu().to(torch.float64) / int(self.total)
        return BERCurve(tuple(map(float, rates)), accuracy, int(self.clean_right) / int(self.total), axis)


def evaluation_sites(model: nn.Module, weights: Weights | None, forward: Callable[[], Any]) -> list[Site]:
    """Return the binarized weights of a model, also of layers that nobody knows, by watching one forward.

    Weights of the latter get their flips in the operand: that is exact whatever the layer does.

    Raises:
        ValueError: there are none.
    """
    binarized_weights(model, weights)  # raises for a pattern that matches nothing
    watch = OperandWatch(model)
    with watch:
        forward()
    sites = watched_sites(model, watch, weights)
    if not sites:
        raise no_sites(model)
    return [site._replace(in_operand=not site.known and site.operand is not None) for site in sites]


def checked_maps(maps: int) -> None:
    """Raise ValueError unless the number of fault maps is an integer of at least 1."""
    if not isinstance(maps, int) or isinstance(maps, bool) or maps < 1:
        raise ValueError(f"maps must be an integer >= 1, got {maps!r}")


def classified_correctly(model: nn.Module, batch: Any) -> Tensor:
    """Return for each sample of a batch ``(inputs, targets)`` whether the highest score is the target's."""
    inputs, targets = batch
    right: Tensor = model(inputs).argmax(1) == targets
    return right


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
    correct: Callable[[nn.Module, Any], Tensor] = classified_correctly,
) -> BERCurve:
    """Measure a classifier's accuracy over bit error rates, in eval mode and one pass over the data.

    Args:
        model: any module with binarized weights, of known layers or not (those are found in the first batch).
        dataloader: yields batches ``(inputs, targets)``, which are moved to the device of the weights.
        rates: strictly ascending bit error rates in [0, 1].
        maps: fault maps at each rate, >= 1. A map is shared by all samples, as in a memory.
        seed: of the fault maps, >= 0.
        error_model: whose parameter ``axis`` takes the rates; independent flips if ``None``.
        axis: the parameter of the error model that ``rates`` sets.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.
        correct: for other batches or answers: ``correct(model, batch)`` returns a bool for each answer.

    Returns:
        The curve, with the clean accuracy. Model, training mode and random streams are as before.

    Raises:
        TypeError, ValueError: an argument is out of range, or the model has no such weights.

    Example:
        >>> from bnnft.nn import BinaryLinear
        >>> model, x = BinaryLinear(64, 4, bias=False), torch.randn(256, 64).sign()
        >>> data = [(x, model(x).argmax(1))]
        >>> curve = accuracy_over_ber(model, data, rates=[0, 0.5], maps=3)
        >>> curve.mean[0], curve.mean[1] < 0.5
        (1.0, True)
    """
    models = error_models(rates, error_model, axis)
    checked_maps(maps)
    Key(seed), binarized_weights(model, weights)  # raise before the data are read
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    meter: AccuracyMeter | None = None
    # a loader draws from torch's generator when its iteration starts
    with _in_eval_mode(model), torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for batch in dataloader:
            moved = tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
            run = partial(correct, model, moved)
            if meter is None:
                meter = AccuracyMeter(evaluation_sites(model, weights, run), models, maps, seed, model)
            meter.update(run)
    if meter is None:
        raise ValueError("accuracy over BER needs data, but the dataloader yielded no batch")
    return meter.curve(rates, axis)
