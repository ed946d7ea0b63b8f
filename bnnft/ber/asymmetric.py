"""Independent bit errors with a rate of their own for each stored bit."""

from dataclasses import dataclass

from torch import Tensor

from bnnft.ber.bernoulli import bernoulli_indices
from bnnft.ber.checks import checked_rate
from bnnft.ber.error_model import ErrorModel, stored_ones
from bnnft.ber.random_bits import Key, below_at, where_true


@dataclass(frozen=True)
class Asymmetric(ErrorModel):
    """A stored 0 reads as 1 at one rate, a stored 1 as 0 at another, independently of all other bits and draws.

    Flips are drawn at the larger rate, and those of the other bit thinned: the work goes with the flips.

    Args:
        rate_0_to_1: the share of stored zeros (weight -1) that read as one, a fraction in [0, 1].
        rate_1_to_0: the share of stored ones (weight +1) that read as zero, a fraction in [0, 1].

    Raises:
        TypeError, ValueError: a rate is no number in [0, 1].

    Source: Yayla et al. 2022, DOI 10.1109/TC.2021.3104736 (asymmetric rates of FeFET memories).

    Example:
        >>> import torch
        >>> from bnnft.ber import Key
        >>> weight = torch.randn(1000, 1000)
        >>> flips = Asymmetric(rate_0_to_1=0, rate_1_to_0=0.1).flips(weight, Key(seed=0))
        >>> bool((weight.flatten()[flips] > 0).all())
        True
    """

    rate_0_to_1: float
    rate_1_to_0: float

    def __post_init__(self) -> None:
        for name in ("rate_0_to_1", "rate_1_to_0"):
            object.__setattr__(self, name, checked_rate(getattr(self, name), name))

    @property
    def rate(self) -> float:
        """The share of bits that read wrong where as many ones as zeros are stored: the mean of both rates."""
        return (self.rate_0_to_1 + self.rate_1_to_0) / 2

    def at_rate(self, rate: float) -> "Asymmetric":
        """Return the errors with another mean of both rates, in the same relation.

        Raises:
            ValueError: a rate would be above 1; both are 0, so that they have no relation.
        """
        if checked_rate(rate) == self.rate:
            return self
        if self.rate == 0:
            raise ValueError(f"the rates of {self!r} have no relation to keep at rate {rate!r}: set one above 0")
        factor = rate / self.rate
        return Asymmetric(self.rate_0_to_1 * factor, self.rate_1_to_0 * factor)

    def bit_rates(self, name: str = "") -> tuple[float, float]:
        """Return both rates."""
        return self.rate_0_to_1, self.rate_1_to_0

    def flips(self, weight: Tensor, key: Key) -> Tensor:
        """Return the sorted flat indices of the bits that read wrong in this draw."""
        low, high = sorted((self.rate_0_to_1, self.rate_1_to_0))
        places = bernoulli_indices(weight.numel(), high, key.stream(), weight.device)
        if low == high:
            return places
        keep = stored_ones(weight, places)
        if self.rate_0_to_1 == high:
            keep.logical_not_()
        if low > 0:
            others = where_true(~keep)
            keep.index_copy_(0, others, below_at(low / high, key.part(0).stream(), places.index_select(0, others)))
        return places.index_select(0, where_true(keep))
