"""Accuracy at several bit error rates under several fault maps, and what to read off it."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from bnnft.plots import Plot, is_rate, plot_curve


@dataclass(frozen=True, eq=False)
class BERCurve:
    """Accuracy at several bit error rates, each under several fault maps.

    Attributes:
        rates: the tested rates, from the fewest errors to the most (or the values of another parameter of the error
            model, see ``axis``: voltages, from the highest down).
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
        highest tested one: a lower bound. Of another parameter it is the value furthest along the curve (the lowest
        voltage), and NaN where the first one falls below already, since nothing is known of those before it.

        Raises:
            ValueError: ``drop`` is no fraction in [0, 1].
        """
        checked_drop(drop)
        floor = self.clean - drop - 1e-12  # a drop of exactly the stated size is within it
        # without errors at a rate of 0
        below, above = 0.0 if is_rate(self.axis) or self.axis == "scale" else math.nan, self.clean
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
