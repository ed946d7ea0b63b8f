"""The class margin: how far the best class score is above the second best."""

from typing import Any

import torch
from torch import Tensor

from bnnft.metrics.histogram import Histogram
from bnnft.metrics.moments import MomentsMetric
from bnnft.plots import Plot, plot_histogram


def class_margin(scores: Tensor) -> Tensor:
    """Return best minus second best class score of each sample, before any learned scale.

    A flip in the last layer moves it by at most 2 (binary inputs), so the prediction stands under fewer than
    ``margin / 2`` flips there.

    Args:
        scores: shape (N, classes), at least two classes.

    Returns:
        Shape (N,), >= 0.

    Raises:
        ValueError: another shape.

    Source: Buschjaeger et al., "Margin-Maximization in Binarized Neural Networks for Optimizing Bit Error
    Tolerance", DATE 2021.

    Example:
        >>> import torch
        >>> class_margin(torch.tensor([[1.0, 7.0, 3.0]]))
        tensor([4.])
    """
    if scores.dim() != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores must have shape (N, classes) with at least 2 classes, got {tuple(scores.shape)}")
    best = scores.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


class ClassMargin(MomentsMetric):
    """Mean, standard deviation and histogram of the class margin. Values of samples: processes merge exactly.

    Args:
        bins: number of equal bins of the histogram.
        kwargs: of :class:`torchmetrics.Metric`.

    ``update`` takes ``scores`` of shape (N, classes), unscaled, and ``fan_in``; ``compute`` returns a dict of
    ``class_margin``, ``class_margin_std``, ``class_margin_nonfinite`` (share of samples whose margin is infinite or no
    number, left out of the others) and ``class_margin_histogram`` (from 0 to 2 ``fan_in``, the largest possible
    margin).

    Source: DATE 2021, see :func:`class_margin`.

    Example:
        >>> import torch
        >>> metric = ClassMargin()
        >>> metric.update(torch.tensor([[1.0, 7.0, 3.0], [2.0, 0.0, -2.0]]), fan_in=16)
        >>> metric.compute()["class_margin"]
        tensor(3.)
    """

    higher_is_better = True
    counts: Tensor
    nonfinite: Tensor
    fan_in: Tensor

    def __init__(self, bins: int = 512, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins!r}")
        self.bins = bins
        self.add_state("counts", torch.zeros(bins, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("nonfinite", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("fan_in", torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")

    def update(self, scores: Tensor, fan_in: int) -> None:
        """Take in the class scores of one batch."""
        margins = class_margin(scores.detach().float())
        # a sample with one score that is no number has no best class
        finite = margins.isfinite() & ~scores.isnan().any(1)
        self.nonfinite += len(margins) - finite.sum()
        margins = margins[finite]
        self._add(margins)
        self.fan_in.fill_(fan_in)
        bins = (margins * (self.bins / (2 * fan_in))).clamp_(max=self.bins - 1).long()
        self.counts += bins.bincount(minlength=self.bins)

    def compute(self) -> dict[str, Any]:
        """Return the statistics over everything taken in."""
        count, (mean, std) = self._moments()[0], self._mean_and_std()
        edges = torch.linspace(0, 2, self.bins + 1, device=mean.device) * self.fan_in
        return {
            "class_margin": mean,
            "class_margin_std": std,
            "class_margin_nonfinite": self.nonfinite / (self.nonfinite + count),
            "class_margin_histogram": Histogram(self.counts, edges),
        }

    def plot(self, val: dict[str, Any] | None = None, ax: Any = None) -> Plot:
        """Draw the histogram of class margins; returns (figure, axes)."""
        result = val if val is not None else self.compute()
        histogram = result["class_margin_histogram"].trimmed()
        return plot_histogram(
            histogram.counts.tolist(),
            histogram.edges.tolist(),
            "class margin",
            {"mean": float(result["class_margin"])},
            ax,
        )
