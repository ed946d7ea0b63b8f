"""The neuron margin: how far a pre-activation is from the threshold where the neuron turns."""

from typing import Any

import torch
from torch import Tensor

from bnnft.metrics.histogram import Histogram
from bnnft.metrics.moments import MomentsMetric
from bnnft.plots import Plot, plot_histogram


def margin(preactivations: Tensor, thresholds: Tensor | float = 0.0) -> Tensor:
    r"""Return ``|s - T|`` for every neuron, position and sample.

    Turning one weight bit moves s by ``2 |x|`` (2 for binary inputs), so a neuron keeps its output under
    any ``ceil(margin / 2) - 1`` flips.

    Args:
        preactivations: shape (N, neurons, \*positions).
        thresholds: one a neuron, or one number; infinite for dead neurons, whose margin is infinite then.

    Returns:
        Margins in the shape of the pre-activations.

    Source: arXiv 2102.01344 (neuron-level metric).

    Example:
        >>> import torch
        >>> margin(torch.tensor([[3.0, -5.0]]), torch.tensor([1.0, 0.0]))
        tensor([[2., 5.]])
    """
    if isinstance(thresholds, Tensor):
        thresholds = thresholds.view(-1, *[1] * (preactivations.dim() - 2))
    return (preactivations - thresholds).abs()


class Margin(MomentsMetric):
    r"""Margins of one layer: mean, standard deviation, quantiles, share that one flip can change, histogram.

    Values of samples: processes that saw different samples merge exactly.

    Args:
        quantiles: levels in (0, 1) to report, in percent as ``margin_q05`` and so on.
        bins: number of equal bins of the histogram, which counts ``margin / sqrt(fan_in)``.
        limit: upper end of the histogram; larger margins count in the last bin.
        kwargs: of :class:`torchmetrics.Metric`.

    ``update`` takes ``preactivations`` of shape (N, neurons, \*positions), ``thresholds`` (one a neuron, or a
    number) and ``fan_in``, the number of weights of one neuron. ``compute`` returns a dict:

    - ``margin``, ``margin_std``: mean and standard deviation;
    - ``margin_normalized``: mean of ``margin / sqrt(fan_in)``, which compares layers of different width;
    - ``margin_below_2``: share of margins below 2, which a single flip can overcome (at 2 it can reach the tie);
    - ``margin_q05`` ...: quantiles, exact to a bin;
    - ``margin_dead``: share of values of dead neurons (infinite threshold), left out of all the others;
    - ``margin_nonfinite``: share of values that are infinite or no numbers, left out of all the others;
    - ``margin_histogram``: a :class:`bnnft.metrics.Histogram`.

    Source: arXiv 2102.01344 (neuron-level metric); the normalized margin is a definition of this library.

    Example:
        >>> import torch
        >>> metric = Margin()
        >>> metric.update(torch.tensor([[3.0, -5.0], [1.0, 0.0]]), torch.tensor([0.0, 1.0]), fan_in=16)
        >>> result = metric.compute()
        >>> result["margin"], result["margin_normalized"], result["margin_below_2"]
        (tensor(2.7500), tensor(0.6875), tensor(0.5000))
    """

    higher_is_better = True
    counts: Tensor
    below_2: Tensor
    dead: Tensor
    nonfinite: Tensor
    fan_in: Tensor

    def __init__(
        self, quantiles: tuple[float, ...] = (0.05, 0.5, 0.95), bins: int = 1024, limit: float = 16.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if any(not 0 < level < 1 for level in quantiles):
            raise ValueError(f"quantiles must lie in (0, 1), got {quantiles!r}")
        if bins < 1 or not limit > 0:
            raise ValueError(f"bins must be at least 1 and limit positive, got bins={bins!r}, limit={limit!r}")
        self.quantiles, self.bins, self.limit = tuple(quantiles), bins, limit
        self.add_state("counts", torch.zeros(bins, dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("below_2", "dead", "nonfinite"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("fan_in", torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")

    def update(self, preactivations: Tensor, thresholds: Tensor | float, fan_in: int) -> None:
        """Take in the margins of one batch of one layer."""
        margins = margin(preactivations.detach().float(), thresholds)
        finite = margins.isfinite()
        if not bool(finite.all()):
            dead = thresholds.isinf() if isinstance(thresholds, Tensor) else torch.zeros(())
            dead_values = int(dead.sum()) * (margins.numel() // margins.shape[1])
            self.dead += dead_values
            self.nonfinite += margins.numel() - finite.sum() - dead_values
            margins = margins[finite]
        margins = margins.flatten()
        self._add(margins)
        self.below_2 += (margins < 2).sum()
        self.fan_in.fill_(fan_in)
        bins = (margins * (self.bins / (self.limit * fan_in**0.5))).clamp_(max=self.bins - 1).long()
        self.counts += bins.bincount(minlength=self.bins)

    def compute(self) -> dict[str, Any]:
        """Return the statistics over everything taken in."""
        count = self._moments()[0]
        mean, std = self._mean_and_std()
        root = self.fan_in.to(mean).sqrt()
        histogram = Histogram(self.counts, torch.linspace(0, self.limit, self.bins + 1, device=mean.device) * root)
        return {
            "margin": mean,
            "margin_std": std,
            "margin_normalized": mean / root,
            "margin_below_2": self.below_2 / count,
            **{f"margin_q{_percent(level)}": histogram.quantile(level) for level in self.quantiles},
            "margin_dead": self.dead / (self.dead + self.nonfinite + count),
            "margin_nonfinite": self.nonfinite / (self.dead + self.nonfinite + count),
            "margin_histogram": histogram,
        }

    def plot(self, val: dict[str, Any] | None = None, ax: Any = None) -> Plot:
        """Draw the histogram of margins; returns (figure, axes)."""
        result = val if val is not None else self.compute()
        histogram = result["margin_histogram"].trimmed()
        return plot_histogram(
            histogram.counts.tolist(),
            histogram.edges.tolist(),
            "margin |s - T|",
            {"mean": float(result["margin"]), "one flip": 2.0},
            ax,
        )


def _percent(level: float) -> str:
    """Name a quantile: 05 for 0.05, 0p1 for 0.001."""
    return f"{100 * level:g}".zfill(2).replace(".", "p")
