"""The faults of one chip: the same cells fail in every read."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from bnnft.ber.checks import checked_chip, checked_choice, checked_rate
from bnnft.ber.error_model import ErrorModel, stored_ones
from bnnft.ber.random_bits import Key, below_at, places_below, where_true

Kind = Literal["flip", "stuck_at"]


@dataclass(frozen=True)
class Chip(ErrorModel):
    """The cells of one die that fail at a rate: each has a number, uniform in [0, 1], and fails where it is below.

    So maps nest: what fails at one rate fails at every higher one, as measured on real arrays, where 98.4 to 100 % of
    the failing cells failed at the next lower voltage too. Cells are independent of each other, chips too. A map is
    drawn once for each rate and kept; where a schedule gives each step another rate, each draws it anew.

    Args:
        rate: the share of failing cells, a fraction in [0, 1].
        chip: number of the die, >= 0; ``None`` for another die in each draw, so that the fault maps of an evaluation
            are those of as many dies.
        kind: a failing cell reads the other bit than was stored (``"flip"``), or one and the same bit always
            (``"stuck_at"``), which shows only where the other one is stored.
        stuck_at_1: the share of failing cells that read 1 always, a fraction in [0, 1]; for ``kind="stuck_at"`` only,
            where it is one half if it is not given.

    Raises:
        TypeError, ValueError: an argument is out of range, or ``stuck_at_1`` is given for flips.

    Source: computed from the fault maps of a KC705 board in github.com/behzadsalami/FPGA-BRAMs-Undervoltig-Study (data
    of Salami, Unsal, Cristal, MICRO 2018, DOI 10.1109/MICRO.2018.00064).

    Example:
        >>> import torch
        >>> from bnnft.ber import Key
        >>> weight = torch.randn(1000)
        >>> low, high = (Chip(rate, chip=7).flips(weight, Key()) for rate in (0.01, 0.05))
        >>> set(low.tolist()) < set(high.tolist())
        True
    """

    rate: float
    chip: int | None = None
    kind: Kind = "flip"
    stuck_at_1: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", checked_rate(self.rate))
        checked_chip(self.chip)
        checked_choice(self.kind, Kind, "kind")
        if self.stuck_at_1 is not None:
            checked_rate(self.stuck_at_1, "stuck_at_1")
            if self.kind == "flip":
                raise ValueError(f"stuck_at_1 is for kind='stuck_at', got {self.stuck_at_1!r} with kind='flip'")

    @property
    def reads_bits(self) -> bool:
        """Whether the flips depend on the stored bits."""
        return self.kind == "stuck_at"

    def bit_rates(self, name: str = "") -> tuple[float, float]:
        """Return the share of zeros and of ones that read wrong, the mean over dies."""
        if self.kind == "flip":
            return self.rate, self.rate
        return self.rate * self._share_at_1, self.rate * (1 - self._share_at_1)

    @property
    def _share_at_1(self) -> float:
        return 0.5 if self.stuck_at_1 is None else self.stuck_at_1

    def flips(self, weight: Tensor, key: Key) -> Tensor:
        """Return the sorted flat indices of the cells that fail, and hold another bit than they are stuck at."""
        if self.chip is None:
            return self._shown(weight, *self._map(weight, key))
        key = key.of_chip(self.chip)
        place = key, weight.numel(), weight.device
        if place not in self._maps:
            self._maps[place] = self._map(weight, key)
        return self._shown(weight, *self._maps[place])

    def failing(self, size: int, key: Key, device: torch.device) -> Tensor:
        """Return the sorted flat indices of the failing cells of the die that the key stands for."""
        return places_below(self.rate, size, key.stream(), device)

    @cached_property
    def _maps(self) -> dict[tuple[Key, int, torch.device], tuple[Tensor, Tensor | None]]:
        return {}

    def _map(self, weight: Tensor, key: Key) -> tuple[Tensor, Tensor | None]:
        """Return the failing cells, and which of them are stuck at 1."""
        cells = self.failing(weight.numel(), key, weight.device)
        if self.kind == "flip":
            return cells, None
        return cells, below_at(self._share_at_1, key.part(0).stream(), cells)

    @staticmethod
    def _shown(weight: Tensor, cells: Tensor, ones: Tensor | None) -> Tensor:
        return cells if ones is None else cells[where_true(stored_ones(weight, cells) != ones)]
