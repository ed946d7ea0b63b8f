"""What every error model is, and the checks that they share."""

import math
from numbers import Real
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from bnnft.ber.random_bits import Key


@runtime_checkable
class ErrorModel(Protocol):
    """Anything that can say which stored bits of a weight read wrong.

    Write your own as a frozen dataclass: its fields become the parameters that ``conf/ber/NAME.yaml`` sets and
    that :class:`bnnft.callbacks.AccuracyOverBER` sweeps.
    """

    def flips(self, weight: Tensor, key: Key) -> Tensor:
        """Return the sorted flat indices (int64, on the weight's device) of the stored bits that read wrong.

        Args:
            weight: the latent weight, any shape; its sign bits are the stored bits, bit 1 is weight +1.
            key: the stream of random bits for this weight and this draw.
        """
        ...


def checked_rate(value: Any, name: str = "rate") -> float:
    """Return the value as a float, or raise if it is not a probability.

    Raises:
        TypeError: not a number (a string, say).
        ValueError: NaN, or outside [0, 1].

    Example:
        >>> checked_rate(1.5)
        Traceback (most recent call last):
        ValueError: rate must be a fraction in [0, 1], got 1.5
    """
    message = f"{name} must be a fraction in [0, 1], got {value!r}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(message)
    number = float(value)
    if math.isnan(number) or not 0 <= number <= 1:
        raise ValueError(message)
    return number
