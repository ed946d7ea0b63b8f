"""RRAM at its lowest power."""

from dataclasses import dataclass
from functools import cached_property

from bnnft.ber.checks import checked_rate
from bnnft.ber.independent import Independent
from bnnft.ber.preset import Preset

_HIGHEST = 0.033


@dataclass(frozen=True)
class Rram(Preset):
    """RRAM in an ultra low-power setting, where up to 3.3 % of the bits are reported to be wrong: an upper value.

    The source tells neither a direction nor a pattern: errors are symmetric, independent, and new in each draw.

    Args:
        rate: the bit error rate, a fraction in [0, 0.033].

    Raises:
        TypeError, ValueError: the rate is above the published one, or no fraction.

    Source: abstract of Buschjaeger et al. 2020, arXiv 2002.00909.

    Example:
        >>> Rram().rate
        0.033
    """

    rate: float = _HIGHEST

    source = "Buschjaeger et al. 2020, arXiv 2002.00909, abstract: RRAM up to 3.3 % in the ultra low-power setting"
    points = (0, 0.001, 0.005, 0.01, 0.02, _HIGHEST)

    def __post_init__(self) -> None:
        if checked_rate(self.rate) > _HIGHEST:
            raise ValueError(f"rate must be in [0, {_HIGHEST}], the published upper value, got {self.rate!r}")

    def at_rate(self, rate: float) -> "Rram":
        """Return the same memory at another rate, up to the published one."""
        return Rram(rate)

    @cached_property
    def model(self) -> Independent:
        """The error model of this rate."""
        return Independent(self.rate)
