"""Independent bit errors at one rate."""

from dataclasses import dataclass

from torch import Tensor

from bnnft.ber.bernoulli import bernoulli_indices
from bnnft.ber.checks import checked_rate
from bnnft.ber.error_model import ErrorModel
from bnnft.ber.random_bits import Key


@dataclass(frozen=True)
class Independent(ErrorModel):
    """Every stored bit reads wrong with the same probability, independently of all others and of all other draws.

    Args:
        rate: the bit error rate, a fraction in [0, 1].

    Raises:
        TypeError, ValueError: ``rate`` is no number in [0, 1].

    Source: Hirtzlin et al. 2019, arXiv 1904.03652; Buschjaeger et al. 2020, arXiv 2002.00909.

    Example:
        >>> import torch
        >>> from bnnft.ber import Key
        >>> len(Independent(0.1).flips(torch.randn(1000, 1000), Key(seed=0)))  # of a million
        99701
    """

    rate: float

    reads_bits = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", checked_rate(self.rate))

    def bit_rates(self, name: str = "") -> tuple[float, float]:
        """Return the rate, for each stored bit."""
        return self.rate, self.rate

    def flips(self, weight: Tensor, key: Key) -> Tensor:
        """Return the sorted flat indices of the bits that read wrong in this draw."""
        return bernoulli_indices(weight.numel(), self.rate, key.stream(), weight.device)
