"""What published memories share: figures with a source, and the error model that stands for them."""

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise

from torch import Tensor

from bnnft.ber.error_model import ErrorModel
from bnnft.ber.random_bits import Key


class Preset(ErrorModel):
    """A published memory at one operating point; a subclass says which error model that is."""

    def __post_init__(self) -> None:
        assert self.model is not None  # built now, so that it raises now

    @cached_property
    @abstractmethod
    def model(self) -> ErrorModel:
        """The error model of this operating point."""

    @property
    @abstractmethod
    def rate(self) -> float:
        """The share of bits that read wrong where as many ones as zeros are stored."""

    @property
    @abstractmethod
    def source(self) -> str:
        """Where its figures are published."""

    @property
    def reads_bits(self) -> bool:
        """Whether the flips depend on the stored bits."""
        return self.model.reads_bits

    def at_rate(self, rate: float) -> ErrorModel:
        """Return errors of the same kind at another rate, which the source does not speak of."""
        return self.model.scaled(rate / self.rate)

    def bit_rates(self, name: str = "") -> tuple[float, float] | None:
        """Return the rates of a stored 0 and a stored 1 at this operating point."""
        return self.model.bit_rates(name)

    def flips(self, weight: Tensor, key: Key) -> Tensor:
        """Return the sorted flat indices of the bits that read wrong in this draw."""
        return self.model.flips(weight, key)


def rate_at(voltage: float, measured: Mapping[float, float], source: str) -> float:
    """Return the bit error rate at a supply voltage, its logarithm linear between the measured points.

    Args:
        voltage: in volts.
        measured: rate by voltage, from the highest voltage down.
        source: of the measurement, for the error.

    Raises:
        ValueError: outside of the measured voltages.

    Example:
        >>> round(rate_at(0.525, {0.55: 0.001, 0.5: 0.1}, "somebody"), 6)
        0.01
    """
    high, low = max(measured), min(measured)
    if isinstance(voltage, bool) or not isinstance(voltage, float | int) or not low <= voltage <= high:
        raise ValueError(f"voltage must be in [{low}, {high}] V, where it was measured, got {voltage!r} ({source})")
    for above, below in pairwise(measured):
        if voltage >= below:
            part = (above - voltage) / (above - below)
            return float(measured[above] ** (1 - part) * measured[below] ** part)
    raise AssertionError(measured)
