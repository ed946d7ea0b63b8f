"""Count, mean and sum of squared deviations of values that arrive in batches and on several processes."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class MomentsMetric(Metric):
    """Base of metrics that need mean and standard deviation of a stream of values.

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
        """Take in all values of a tensor."""
        if values.numel():
            mean = values.mean()
            more = (torch.tensor(values.numel(), device=values.device), mean, (values - mean).square().sum())
            states = zip(self._moments(), more, strict=True)
            merged = _merged(*(torch.stack([a, b.to(a)]) for a, b in states))
            self.count, self.mean, self.m2 = (state.reshape(1) for state in merged)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        super()._reduce_states(incoming_state)
        self.count, self.mean, self.m2 = (state.reshape(1) for state in self._moments())

    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return count, mean and M2 of everything taken in, merged over processes."""
        return _merged(*(state.reshape(-1) for state in (self.count, self.mean, self.m2)))

    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Return mean and population standard deviation, NaN without values."""
        count, mean, m2 = self._moments()
        nan = torch.full_like(mean, torch.nan)
        return torch.where(count > 0, mean, nan), torch.where(count > 0, (m2 / count.clamp(min=1)).sqrt(), nan)


def _merged(count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = count.sum()
    share = count / total.clamp(min=1)
    overall = (share * mean).sum()
    return total, overall, m2.sum() + (count * (mean - overall).square()).sum()
