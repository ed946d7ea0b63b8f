"""How errors are compensated: what a user asks for."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from bnnft.ber import ErrorModel, as_error_model, checked_choice

Kind = Literal["thresholds", "input_sum", "recalibration", "auto"]
Die = Literal["same", "other"]


class Method:
    """How errors are compensated.

    With ``W = c w + d`` the mean of what a weight ``w`` reads as, ``c = 1 - p01 - p10`` and ``d = p01 - p10``, a sum
    over weights and inputs ``s`` reads as ``c s + d sum(x)`` on average.

    - ``"thresholds"``: thresholds are scaled by what is left of a sum, ``c``, over what was left when the statistics of
      the batch norms were gathered.
    - ``"input_sum"``: that, and the known shift ``d sum(x)`` of each sample is subtracted before.
    - ``"recalibration"``: the statistics of all batch norms are gathered anew under errors, from some samples without
      labels.
    - ``"input_sum"`` and ``"recalibration"`` together: the shift is subtracted, and statistics are gathered then.
    - ``"auto"``: ``"input_sum"``, and where scaling was measured not to help, behind max-pooling and in neurons of few
      inputs, recalibration if there are data for it, else the shift alone.

    Args:
        kind: one of these, or several.
        samples: that recalibration takes, >= 2.
        die: that recalibration runs under: the ``"same"`` fault map that the model is to run under, or an ``"other"``.
        gathered_at: rate or error model that the batch norms' statistics were gathered at; what
            :class:`bnnft.callbacks.BitFlipTraining` has taken down for each layer if ``None``, and no errors where that
            is nothing.

    Attributes:
        kinds: all that are asked for.

    Raises:
        TypeError, ValueError: an argument is out of range.

    Source: derived here; the mean of a sum under flips as of Buschjaeger et al. 2020, arXiv 2002.00909.

    Example:
        >>> Method("input_sum").scales, Method("input_sum").shifts, Method("recalibration").scales
        (True, True, False)
    """

    def __init__(
        self,
        kind: str | Sequence[str] = "auto",
        samples: int = 256,
        die: Die = "same",
        gathered_at: float | ErrorModel | None = None,
    ) -> None:
        given: Any = kind
        kinds = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Sequence) else ()
        if not kinds:
            raise TypeError(f"kind must be one or several of {', '.join(get_args(Kind))}, got {given!r}")
        for each in kinds:
            checked_choice(each, Kind, "kind")
        checked_choice(die, Die, "die")
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 2:
            raise ValueError(f"samples must be an integer >= 2, got {samples!r}")
        self.kinds, self.samples, self.die = kinds, samples, die
        self.gathered_at = None if gathered_at is None else as_error_model(gathered_at)

    def __repr__(self) -> str:
        kind = self.kinds[0] if len(self.kinds) == 1 else self.kinds
        return f"Method({kind!r}, samples={self.samples}, die={self.die!r}, gathered_at={self.gathered_at!r})"

    @property
    def scales(self) -> bool:
        """Whether thresholds are scaled."""
        return not self.recalibrates and not {"thresholds", "input_sum", "auto"}.isdisjoint(self.kinds)

    @property
    def shifts(self) -> bool:
        """Whether the shift by the sum of the inputs is subtracted."""
        return not {"input_sum", "auto"}.isdisjoint(self.kinds)

    @property
    def recalibrates(self) -> bool:
        """Whether statistics are gathered anew, those of all batch norms."""
        return "recalibration" in self.kinds

    @property
    def auto(self) -> bool:
        """Whether each layer gets what helps there."""
        return "auto" in self.kinds


def as_method(value: str | Sequence[str] | Method) -> Method:
    """Return how errors are compensated, of a kind, several kinds, or a method as it is.

    Raises:
        TypeError, ValueError: neither, or no such kind.

    Example:
        >>> as_method("thresholds")
        Method('thresholds', samples=256, die='same', gathered_at=None)
    """
    given: Any = value
    return given if isinstance(given, Method) else Method(given)
