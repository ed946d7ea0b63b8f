"""A score at several bit error rates under several fault maps, and what to read off it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from bnnft.evaluation.names import CurveNames
from bnnft.plots import Plot, plot_curve

FRACTION = (0.0, 1.0)
_CLEAN_AT_ZERO = ("rate", "scale")  # at whose zero no bit reads wrong; others may leave errors of another kind


@dataclass(frozen=True, eq=False)
class BERCurve:
    """A score, accuracy if nothing else is said, at several bit error rates, each under several fault maps.

    Attributes:
        rates: the tested rates as floats, from the fewest errors to the most (or the values of another parameter of the
            error model, see ``axis``: voltages, from the highest down).
        values: float64, shape (rates, maps); accuracies are fractions in [0, 1].
        clean: the score without flips.
        axis: name of the parameter that ``rates`` holds.
        score: name of the score.
        higher_is_better: of the score; ``None`` if that is not known: then there is no tolerable BER.
        bounds: that the score can't leave, and neither do intervals; [0, 1] for accuracies, none for other scores
            where they are not given. Scores within [0, 1] are shown in percent.
        name: of the curve where several are told apart.

    Raises:
        ValueError: the values have another shape.

    Example:
        >>> accuracy = torch.tensor([[0.9, 0.9], [0.88, 0.90], [0.5, 0.6]], dtype=torch.float64)
        >>> curve = BERCurve((0.0, 0.1, 0.2), accuracy, clean=0.9)
        >>> [round(mean, 3) for mean in curve.mean], round(curve.tolerable_ber(drop=0.1), 3)
        ([0.9, 0.89, 0.55], 0.126)
    """

    rates: tuple[float, ...]
    values: Tensor
    clean: float
    axis: str = "rate"
    score: str = "accuracy"
    higher_is_better: bool | None = True
    bounds: tuple[float, float] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        """Hold plain numbers, whatever numbers were given."""
        own: dict[str, Any] = {
            "rates": tuple(map(float, self.rates)),
            "values": torch.as_tensor(self.values, dtype=torch.float64),
            "clean": float(self.clean),
        }
        if self.bounds is None:
            own["bounds"] = FRACTION if self.score == "accuracy" else (-math.inf, math.inf)
        for name, value in own.items():
            object.__setattr__(self, name, value)
        if self.values.dim() != 2 or len(self.values) != len(self.rates) or not self.values.numel():
            shape = tuple(self.values.shape)
            raise ValueError(f"values must have shape ({len(self.rates)} rates, maps), got {shape}")

    @property
    def accuracy(self) -> Tensor:
        """The values of a curve of accuracies."""
        if self.score != "accuracy":
            raise AttributeError(f"this curve shows {self.score} and no accuracy: use its `values`")
        return self.values

    @property
    def names(self) -> CurveNames:
        """How the curve and its parts are called in logs, files and results."""
        return CurveNames(self.score, self.axis, self.name)

    @property
    def maps(self) -> int:
        """Number of fault maps at each rate."""
        return self.values.shape[1]

    @property
    def mean(self) -> list[float]:
        """Mean over fault maps, one value a rate; NaN where the score of a map is NaN."""
        return [float(mean) for mean in self.values.mean(1)]

    @property
    def std(self) -> list[float]:
        """Sample standard deviation over fault maps, NaN for a single map."""
        if self.maps < 2:
            return [math.nan] * len(self.rates)
        return [float(std) for std in self.values.std(1)]

    @property
    def interval(self) -> list[tuple[float, float]]:
        """95 % confidence interval of the mean over maps (Student's t) within ``bounds``, NaN for a single map.

        Calibrated for errors that are independent. Where a few dies are far worse than the rest, as of clustered
        errors, a mean says little: see :meth:`quantiles`.
        """
        return [interval(maps, self.bounds) for maps in self.values]

    def quantiles(self, levels: Sequence[float] = (0.05, 0.5, 0.95)) -> list[tuple[float, ...]]:
        """Return for each rate quantiles of the score over maps, interpolated linearly.

        Raises:
            ValueError: a level is no fraction in [0, 1].

        Example:
            >>> BERCurve((0.1,), [[0.5, 0.7, 0.9]], clean=0.9).quantiles([0, 0.5, 1])
            [(0.5, 0.7, 0.9)]
        """
        if not all(0 <= level <= 1 for level in levels):
            raise ValueError(f"levels must be fractions in [0, 1], got {list(levels)!r}")
        rows = torch.quantile(self.values, torch.tensor(list(levels), dtype=torch.float64), dim=1).T
        return [tuple(row.tolist()) for row in rows]

    def tolerable_ber(self, drop: float = 0.01) -> float:
        """Return the highest rate up to which the mean score stays within ``drop`` of the clean score.

        Where a lower score is better, it may rise by ``drop``. Between tested rates the mean is interpolated linearly.
        If no tested rate is worse, the result is the highest tested one: a lower bound, see :meth:`is_lower_bound`. Of
        another parameter it is the value furthest along the curve (the lowest voltage). NaN where nothing is known: the
        first value is worse already (of a rate it is interpolated from the clean score at 0), or a score is NaN.

        Raises:
            ValueError: ``drop`` is out of range, or it is not known whether a higher score is better.
        """
        checked_drop(drop, self.bounds)
        if self.higher_is_better is None:
            raise ValueError(
                f"a tolerable BER needs higher_is_better: is a higher {self.score} better, or a lower one?"
            )
        sign = 1 if self.higher_is_better else -1
        below, above = 0.0 if self.axis in _CLEAN_AT_ZERO else math.nan, sign * self.clean
        floor, rounding = above - drop, 1e-12 * max(1.0, abs(self.clean))  # a drop of exactly this size is within it
        for rate, mean in zip(self.rates, self.mean, strict=True):
            if math.isnan(mean) or not math.isfinite(floor):
                return math.nan
            if sign * mean < floor - rounding:
                return below + (rate - below) * max(0.0, above - floor) / (above - sign * mean)
            below, above = rate, sign * mean
        return self.rates[-1]

    def is_lower_bound(self, drop: float = 0.01) -> bool:
        """Return whether the tolerable BER is a lower bound: the mean never gets worse by more than ``drop``."""
        return self.tolerable_ber(drop) == self.rates[-1]

    def plot(self, ax: Any = None, label: str | None = None, levels: tuple[float, float] | None = None) -> Plot:
        """Draw mean and 95 % interval over the rates; returns (figure, axes).

        Args:
            ax: the axes to draw on; new ones if ``None``.
            label: for the legend; the curve's name if ``None``.
            levels: draw the band between these two quantiles over maps instead.
        """
        band: Any = self.interval if levels is None else self.quantiles(levels)
        shown = (self.axis, self.score, self.higher_is_better, self.bounds == FRACTION)
        return plot_curve(self.rates, self.mean, band, ax, label or self.name or None, *shown)


def interval(values: Tensor, bounds: tuple[float, float] | None = FRACTION) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean of some values (Student's t), NaN for a single one.

    Args:
        values: shape (N,).
        bounds: that the values can't leave; the interval is cut there.
    """
    if len(values) < 2:
        return math.nan, math.nan
    mean, half = float(values.mean()), student(len(values) - 1) * float(values.std()) / math.sqrt(len(values))
    if math.isnan(half):
        return math.nan, math.nan
    low, high = bounds or (-math.inf, math.inf)
    return max(low, mean - half), min(high, mean + half)


@cache
def student(freedom: int) -> float:
    """Return the 0.975 quantile of Student's t with so many degrees of freedom."""
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))


def checked_drop(drop: Any, bounds: tuple[float, float] | None = FRACTION) -> None:
    """Raise ValueError unless the tolerated drop of a score within these bounds is a fraction, or a number >= 0."""
    fraction = bounds == FRACTION
    if isinstance(drop, bool) or not isinstance(drop, Real) or not 0 <= float(drop) <= (1 if fraction else math.inf):
        raise ValueError(f"drop must be {'a fraction in [0, 1]' if fraction else 'a number >= 0'}, got {drop!r}")
