"""Bit errors that come together: weak lines in weak blocks of a memory array."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bnnft.ber.checks import checked_choice
from bnnft.ber.chip import Chip
from bnnft.ber.random_bits import Key, places_below, uniforms

Lines = Literal["bitline", "wordline"]

_LEAST = 0.05  # with less, blocks that matter at high rates are weaker than the smallest float


@dataclass(frozen=True)
class Clustered(Chip):
    """Bits fail along weak lines of a memory array, most of them in few blocks; the overall rate is the stated one.

    The bits of a weight are laid into blocks of ``rows`` words of ``columns`` bits, word by word. A block draws its
    weakness ``G`` from a gamma distribution of mean 1 and shape ``block_dispersion``, each of its lines a weakness
    ``L`` of mean ``G`` from one of shape ``line_dispersion * G``, and each cell fails with probability
    ``1 - exp(-c L)``, where ``c`` is such that the mean over all is exactly ``rate``. So the faults of a block are, at
    small rates, a negative binomial number with ``1/k = 1/block_dispersion + 1/(line_dispersion * lines)``; and with
    the weaknesses of one chip, what fails at one rate fails at every higher one.

    The default geometry and dispersions stand for one FPGA board (KC705, 28 nm, block RAM of 16 kbit at 0.53 V), of
    which is known: k = 0.079; 86 % of the faults share a column of a block with another, 72 % are in columns with four
    or more; nearly all columns fail in even or in odd rows only, as with two words on each row of cells. They were
    fitted to that: k = 0.08, 91 % and 74 % in simulation. Other memories differ.

    Args:
        rate: the share of failing cells, on average over weights and chips, a fraction in [0, 1].
        chip, kind, stuck_at_1: as of :class:`bnnft.ber.Chip`.
        lines: what is weak together: a ``"bitline"``, as in SRAM at a low voltage, or a ``"wordline"``, as in DRAM.
        rows: words of a block.
        columns: bits of a word.
        multiplexing: words that share a wordline, so that each column has as many bitlines.
        block_dispersion: the lower, the fewer blocks hold the faults, >= 0.05.
        line_dispersion: the lower, the fewer lines of a block hold its faults, >= 1e-6.

    Raises:
        TypeError, ValueError: an argument is out of range, or the words do not fill the wordlines.

    Source: figures computed from github.com/behzadsalami/FPGA-BRAMs-Undervoltig-Study (data of Salami, Unsal, Cristal,
    MICRO 2018, DOI 10.1109/MICRO.2018.00064); wordlines: plots of github.com/CMU-SAFARI/DRAM-Voltage-Study (Chang et
    al. 2017, arXiv 1705.10292).

    Example:
        >>> import torch
        >>> from bnnft.ber import Key
        >>> flips = Clustered(0.01).flips(torch.randn(1000, 1000), Key(seed=3))
        >>> blocks = torch.bincount(flips // (1024 * 16), minlength=62)
        >>> int((blocks == 0).sum()), int(blocks.max())  # of 62 blocks
        (43, 3091)
    """

    lines: Lines = "bitline"
    rows: int = 1024
    columns: int = 16
    multiplexing: int = 2
    block_dispersion: float = 0.156
    line_dispersion: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_choice(self.lines, Lines, "lines")
        for name in ("rows", "columns", "multiplexing"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if self.rows % self.multiplexing:
            raise ValueError(
                f"multiplexing must divide rows, as words that share a wordline fill it: "
                f"got multiplexing={self.multiplexing} for rows={self.rows}"
            )
        for name, least in (("block_dispersion", _LEAST), ("line_dispersion", 1e-6)):
            value = getattr(self, name)
            if not (isinstance(value, float | int) and least <= value < math.inf):
                raise ValueError(f"{name} must be a number >= {least:g}, got {value!r}")

    def failing(self, size: int, key: Key, device: torch.device) -> Tensor:
        """Return the sorted flat indices of the failing cells of the die that the key stands for."""
        blocks = math.ceil(size / (self.rows * self.columns))
        heights = self.rows // self.multiplexing
        # rates by block, place along the bitlines, word of the wordline, and column
        shape = (blocks, 1, self.multiplexing, self.columns) if self.lines == "bitline" else (blocks, heights, 1, 1)
        rates = self._line_rates(shape, key).to(device)
        cells = rates.expand(blocks, heights, self.multiplexing, self.columns).reshape(-1)
        return places_below(cells, size, key.stream(), device)

    def _line_rates(self, shape: tuple[int, ...], key: Key) -> Tensor:
        """Return the probability that a cell fails, for each line: 1 - exp(-c L), with logarithms of c and L.

        For a gamma number L of shape s G and scale 1 / s, the mean of exp(-c L) is exp(-G s log(1 + c / s)), and the
        mean of that over G is (1 + s log(1 + c / s) / k)^-k: to be 1 - rate, which gives c.
        """
        if self.rate in (0, 1) or 0 in shape:
            return torch.full(shape, self.rate, dtype=torch.float64)
        k, s = self.block_dispersion, self.line_dispersion
        grown = k * math.expm1(min(-math.log1p(-self.rate) / k, 700.0)) / s  # log(1 + c / s)
        log_c = math.log(s) + grown + math.log(-math.expm1(-grown))
        weakness = _log_gamma(torch.full((shape[0],), k), key.part(0)).exp() / k
        shapes = (s * weakness).clamp(min=1e-300).view(-1, *[1] * (len(shape) - 1)).expand(shape)
        log_weakness = _log_gamma(shapes.reshape(-1), key.part(1)).view(shape) - math.log(s)
        return -torch.expm1(-(log_c + log_weakness).exp())


def _log_gamma(shapes: Tensor, key: Key) -> Tensor:
    """Return logarithms of gamma distributed numbers of these shapes (float64) and scale 1.

    Small shapes give numbers below the smallest float: G(a) is G(a + 1) u^(1/a), with u uniform (Marsaglia and Tsang
    2000, section 6), and G(a + 1) comes from the quantiles, so that a number grows with its shape.
    """
    from scipy.special import gammaincinv

    shapes = shapes.to(torch.float64)
    above = torch.from_numpy(gammaincinv((shapes + 1).numpy(), uniforms(key.part(0).stream(), 0, len(shapes)).numpy()))
    return above.log() + uniforms(key.part(1).stream(), 0, len(shapes)).log() / shapes
