"""SRAM in 65 nm at low voltage, as measured on test chips."""

from dataclasses import dataclass
from functools import cached_property

from bnnft.ber.chip import Chip
from bnnft.ber.preset import Preset, rate_at

_MEASURED = {0.55: 2.3e-3, 0.5: 1.56e-2}


@dataclass(frozen=True)
class Sram65(Preset):
    """SRAM test chips in 65 nm at 0.50 to 0.55 V (nominal 1 V): 0.23 % of the bits wrong at 0.55 V, 1.56 % at 0.50 V.

    Between both the logarithm of the rate is linear. The source tells no direction: a failing cell flips either bit.
    It tells nothing of persistence: the failing cells are those of one die, and a lower voltage adds some, as was
    measured on 28 nm block RAM, see :class:`bnnft.ber.Bram28`.

    Args:
        voltage: supply, in [0.50, 0.55] V.
        chip: number of the die, >= 0; ``None`` for another die in each draw.

    Raises:
        ValueError: the voltage is outside of the published ones.

    Source: abstract of Sun et al., IEEE TVLSI 25(10):2962-2965, 2017.

    Example:
        >>> Sram65(voltage=0.5).rate
        0.0156
    """

    voltage: float = 0.55
    chip: int | None = 0

    source = "Sun et al., Low-VDD Operation of SRAM Synaptic Array, IEEE TVLSI 25(10):2962-2965, 2017, abstract"
    axis, points = "voltage", (0.55, 0.54, 0.53, 0.52, 0.51, 0.5)

    @property
    def rate(self) -> float:
        """The share of bits that read wrong."""
        return rate_at(self.voltage, _MEASURED, self.source)

    @cached_property
    def model(self) -> Chip:
        """The error model of this voltage."""
        return Chip(self.rate, self.chip)
