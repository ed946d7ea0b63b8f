"""Counts of values in bins."""

from typing import NamedTuple

import torch
from torch import Tensor


class Histogram(NamedTuple):
    """How many values fell into each bin.

    Attributes:
        counts: one number a bin.
        edges: one more than bins, ascending.
    """

    counts: Tensor
    edges: Tensor

    def trimmed(self, bins: int = 64) -> "Histogram":
        """Return at most this many bins that cover what is filled, for showing.

        Example:
            >>> import torch
            >>> Histogram(torch.tensor([1, 2, 3, 4, 0]), torch.arange(6)).trimmed(2)
            Histogram(counts=tensor([3, 7]), edges=tensor([0, 2, 4]))
        """
        filled = int(self.counts.nonzero().max()) + 1 if bool(self.counts.any()) else 1
        group = -(-filled // bins)
        groups = -(-filled // group)
        padded = torch.nn.functional.pad(self.counts, (0, max(0, groups * group - len(self.counts))))
        edges = self.edges[torch.arange(groups + 1, device=self.edges.device).mul(group).clamp(max=len(self.counts))]
        return Histogram(padded[: groups * group].view(groups, group).sum(1), edges)

    def quantile(self, level: float) -> Tensor:
        """Return the value below which this share of the counted values lies, linear within a bin; NaN without counts.

        Example:
            >>> import torch
            >>> Histogram(torch.tensor([1, 3]), torch.tensor([0.0, 1.0, 2.0])).quantile(0.5)
            tensor(1.3333)
        """
        if not bool(self.counts.any()):
            return self.edges.new_tensor(torch.nan)
        cumulative = self.counts.cumsum(0).to(self.edges)
        target = (level * cumulative[-1]).clamp(min=torch.finfo(cumulative.dtype).tiny)  # in a filled bin
        place = int((cumulative < target).sum().clamp(max=len(self.counts) - 1))
        below = cumulative[place] - self.counts[place]
        part = (target - below) / self.counts[place]
        return self.edges[place] + part * (self.edges[place + 1] - self.edges[place])
