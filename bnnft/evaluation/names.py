"""How a curve and its parts are called in logs, files and results."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bnnft.plots import axis_name, distinct_numbers


def checked_name(name: str | None) -> str:
    """Return the name of a curve, empty for ``None``; raises ValueError unless it can stand in a log."""
    if name is not None and not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"name must be made of letters, digits, _ and -, got {name!r}")
    return name or ""


@dataclass(frozen=True)
class CurveNames:
    """Names of a curve's parts, without the stage that stands before them in a log (``test/``).

    Args:
        score: what the curve shows, for example ``"accuracy"``.
        axis: the parameter of the error model that it is over.
        name: of the curve where several are told apart; stands before each of its names.

    Example:
        >>> CurveNames().over, CurveNames("mean_squared_error", "voltage", "sram").over
        ('acc_over_ber', 'sram_mean_squared_error_over_voltage')
    """

    score: str = "accuracy"
    axis: str = "rate"
    name: str = ""

    def points(self, rates: Sequence[float]) -> list[str]:
        """Return the name of the score at each rate, with as many digits as tell the rates apart.

        Example:
            >>> CurveNames().points([0, 0.05]), CurveNames().points([0.1, 0.1000001])
            (['acc_ber_0', 'acc_ber_0p05'], ['acc_ber_0p1', 'acc_ber_0p1000001'])
        """
        return [self._own(f"{self._short}_{self._axis}_{rate}").replace(".", "p") for rate in distinct_numbers(rates)]

    def all(self, rates: Sequence[float]) -> set[str]:
        """Return all names of a curve at these rates in a log."""
        return {*self.points(rates), self.over, self.tolerable, self.table, self.figure}

    @property
    def over(self) -> str:
        """Name of the whole curve."""
        return self._own(f"{self._short}_over_{self._axis}")

    @property
    def tolerable(self) -> str:
        """Name of the tolerable BER, or of what else the curve is over."""
        return self._own(f"tolerable_{self._axis}")

    @property
    def faulty(self) -> str:
        """Name of the score under the error model as it is."""
        return self._own(f"{self._short}_faulty")

    @property
    def table(self) -> str:
        """Name of the curve as a table."""
        return self._own(f"{self._axis}_table")

    @property
    def figure(self) -> str:
        """Name of the curve as a figure."""
        return self._own(f"{self._axis}_figure")

    @property
    def file(self) -> str:
        """Name of the curve's files, without their suffix."""
        return self._own(f"{self.score}_over_ber")

    @property
    def _axis(self) -> str:
        return axis_name(self.axis)

    @property
    def _short(self) -> str:
        return "acc" if self.score == "accuracy" else self.score

    def _own(self, part: str) -> str:
        return f"{self.name}_{part}" if self.name else part
