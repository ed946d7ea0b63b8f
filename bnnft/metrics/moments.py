"""Count, mean and sum of squared deviations of values that arrive in batches and on several processes."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class MomentsMetric(Metric):
    """Base of metrics that need mean and standard deviation of a stream of values, or of several side by side.

    Batches and processes merge by count, mean and M2 (Chan, Golub, LeVeque 1979), which loses no digits where
    sums of squares do.
    """

    full_state_update = False
    count: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # torchmetrics puts the states of all processes side by side; _moments merges them
        self.add_state("count", torch.zeros(1, dtype=torch.int64), dist_reduce_fx="cat")
        self.add_state("mean", torch.zeros(1), dist_reduce_fx="cat")
        self.add_state("m2", torch.zeros(1), dist_reduce_fx="cat")

    def _add(self, values: Tensor) -> None:
        """Take in the rows of a tensor, each a value or the values of all streams."""
        if len(values):
            mean = values.mean(0)
            more = (torch.tensor(len(values), device=values.device), mean, (values - mean).square().sum(0))
            self._keep(*(_pair(a, b) for a, b in zip(self._moments(), more, strict=True)))

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        for name in ("mean", "m2"):  # one that is empty does not know yet how many streams there are
            own, other = getattr(self, name), incoming_state[name]
            setattr(self, name, own if own.dim() >= other.dim() else own.new_zeros(1, *other.shape[1:]))
            incoming_state[name] = other if other.dim() >= own.dim() else other.new_zeros(1, *own.shape[1:])
        super()._reduce_states(incoming_state)
        self._keep(self.count, self.mean, self.m2)

    def _keep(self, count: Tensor, mean: Tensor, m2: Tensor) -> None:
        self.count, self.mean, self.m2 = (state.unsqueeze(0) for state in _merged(count, mean, m2))

    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return count, mean and M2 of everything taken in, merged over processes."""
        count = self.count.reshape(-1)  # of several processes they are stacked
        return _merged(count, *(state.reshape(len(count), -1).squeeze(1) for state in (self.mean, self.m2)))

    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Return mean and population standard deviation, NaN without values."""
        count, mean, m2 = self._moments()
        nan = torch.full_like(mean, torch.nan)
        return torch.where(count > 0, mean, nan), torch.where(count > 0, (m2 / count.clamp(min=1)).sqrt(), nan)


def _pair(a: Tensor, b: Tensor) -> Tensor:
    """Put two states one above the other; the first may be empty and not know yet how many streams there are."""
    return torch.stack([a.expand_as(b), b.to(a)])


def _merged(count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = count.sum()
    weights = count.to(mean)
    overall = (weights / total.clamp(min=1)) @ mean
    return total, overall, m2.sum(0) + weights @ (mean - overall).square()
