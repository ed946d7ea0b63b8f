"""Block RAM of a 28 nm FPGA below its nominal voltage, from public fault maps."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from bnnft.ber.checks import checked_choice
from bnnft.ber.chip import Chip
from bnnft.ber.clustered import Clustered
from bnnft.ber.preset import Preset, rate_at

Placement = Literal["independent", "bitline"]

# share of ones that read 0: faults in the authors' maps of a VC707 board over its 2060 blocks of 16 kbit
_MEASURED = {0.60: 1.19e-7, 0.59: 7.11e-7, 0.58: 4.33e-6, 0.57: 2.29e-5, 0.56: 8.09e-5, 0.55: 2.23e-4, 0.54: 7.02e-4}


@dataclass(frozen=True)
class Bram28(Preset):
    """Block RAM of a VC707 board (28 nm FPGA) at 0.54 to 0.60 V: ones that read 0, few, and always the same ones.

    Between the measured voltages, in steps of 10 mV, the logarithm of the rate is linear. The memory was filled with
    ones when it was measured, so nothing is known of zeros, which stay right here. A lower voltage adds failing cells
    and heals none.

    Args:
        voltage: supply of the block RAM, in [0.54, 0.60] V; at 0.54 V the board just worked.
        chip: number of the die, >= 0; ``None`` for another die in each draw.
        placement: failing cells are ``"independent"`` of each other, which is a simplification, or come along weak
            lines (``"bitline"``), by the defaults of :class:`bnnft.ber.Clustered`, fitted to another board of the
            source.

    Raises:
        ValueError: the voltage is outside of the published ones; there is no such placement.

    Source: computed from github.com/behzadsalami/FPGA-BRAMs-Undervoltig-Study (data of Salami, Unsal, Cristal, MICRO
    2018, DOI 10.1109/MICRO.2018.00064).

    Example:
        >>> Bram28(voltage=0.54).rate  # of all bits; half of them ones
        0.000351
    """

    voltage: float = 0.54
    chip: int | None = 0
    placement: Placement = "independent"

    source = "data of Salami, Unsal, Cristal, MICRO 2018, github.com/behzadsalami/FPGA-BRAMs-Undervoltig-Study (VC707)"
    axis, points = "voltage", (0.6, 0.59, 0.58, 0.57, 0.56, 0.55, 0.54)

    def __post_init__(self) -> None:
        checked_choice(self.placement, Placement, "placement")
        super().__post_init__()

    @property
    def rate(self) -> float:
        """The share of bits that read wrong where half of them are ones."""
        return rate_at(self.voltage, _MEASURED, self.source) / 2

    @cached_property
    def model(self) -> Chip:
        """The error model of this voltage."""
        kind = Chip if self.placement == "independent" else Clustered
        return kind(2 * self.rate, self.chip, kind="stuck_at", stuck_at_1=0.0)
