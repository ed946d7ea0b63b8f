"""SRAM with stuck cells at seven operating points, from the code of its authors."""

from dataclasses import dataclass
from functools import cached_property

from bnnft.ber.chip import Chip
from bnnft.ber.preset import Preset

_FAULTY = (1.213e-2, 3.98e-3, 1.214e-3, 1.55e-4, 1.26e-4, 4.07e-5, 1.31e-5)


@dataclass(frozen=True)
class Sram14(Preset):
    """A memory of 8192 x 128 cells at seven operating points, whose voltages are not published: stuck cells.

    Half of the failing cells are stuck at 0, half at 1; each shows where the other bit is stored, so that the rate of
    flips is half that of failing cells. The failing cells are those of one die; a milder point has fewer of them.

    Args:
        level: the operating point in the order of the source: 1 (1.213 % of the cells fail) to 7 (0.00131 %).
        chip: number of the die, >= 0; ``None`` for another die in each draw.

    Raises:
        ValueError: there is no such level.

    Source: a comment in github.com/IBM/NeuralFuse, ``faultmodels/randomfault.py`` (code of Sun et al., NeurIPS 2024,
    arXiv 2306.16869).

    Example:
        >>> Sram14(level=1).rate
        0.006065
    """

    level: int = 1
    chip: int | None = 0

    source = "github.com/IBM/NeuralFuse, faultmodels/randomfault.py: faulty bits at 7 operating points, half stuck at 0"
    axis, points = "level", (7, 6, 5, 4, 3, 2, 1)

    def __post_init__(self) -> None:
        if isinstance(self.level, bool) or not isinstance(self.level, int) or not 1 <= self.level <= len(_FAULTY):
            raise ValueError(f"level must be an integer in [1, {len(_FAULTY)}], got {self.level!r} ({self.source})")
        super().__post_init__()

    @property
    def rate(self) -> float:
        """The share of bits that read wrong where half of them are ones."""
        return _FAULTY[self.level - 1] / 2

    @cached_property
    def model(self) -> Chip:
        """The error model of this level."""
        return Chip(2 * self.rate, self.chip, kind="stuck_at", stuck_at_1=0.5)
