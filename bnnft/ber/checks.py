"""Checks of the arguments of error models, and of the flips that they draw."""

import math
from numbers import Real
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from bnnft.ber.error_model import ErrorModel


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


def checked_scale(scale: Any) -> float:
    """Return what multiplies all rates of several error models as a float, or raise ValueError if it is negative."""
    if isinstance(scale, bool) or not isinstance(scale, Real) or not 0 <= float(scale) < math.inf:
        raise ValueError(f"scale must be a number >= 0, got {scale!r}")
    return float(scale)


def checked_choice(value: Any, kinds: Any, name: str) -> None:
    """Raise ValueError unless the value is one of a ``Literal``'s.

    Example:
        >>> from typing import Literal
        >>> checked_choice("bit", Literal["bitline", "wordline"], "lines")
        Traceback (most recent call last):
        ValueError: lines must be one of bitline, wordline, got 'bit'
    """
    if value not in get_args(kinds):
        raise ValueError(f"{name} must be one of {', '.join(get_args(kinds))}, got {value!r}")


def checked_number(number: Any, name: str) -> None:
    """Raise ValueError unless what is told apart by numbers has an integer of at least 0."""
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {number!r}")


def checked_chip(chip: Any) -> None:
    """Raise ValueError unless the number of a chip is an integer of at least 0, or ``None``."""
    if chip is not None and (isinstance(chip, bool) or not isinstance(chip, int) or chip < 0):
        raise ValueError(f"chip must be an integer >= 0, or null for another chip in each draw, got {chip!r}")


def checked_flips(flips: Any, weight: Tensor, error_model: object, layer: str) -> Tensor:
    """Return flips as they are, or raise if they are no list of a weight's bits.

    Args:
        flips: what an error model drew: to be sorted, distinct flat indices of the weight, as an int64 tensor of shape
            (n,) on its device.
        weight: whose bits they are, any shape.
        error_model: that drew them, for the error.
        layer: qualified name of the weight or of the module that puts out the bits, for the error.

    Raises:
        TypeError: not such a tensor.
        ValueError: not sorted, a bit is listed twice, or there is no such bit.

    Example:
        >>> import torch
        >>> checked_flips(torch.tensor([0, 9]), torch.zeros(2, 3), "Mine()", "fc1.weight")
        Traceback (most recent call last):
        ValueError: flips of Mine() for 'fc1.weight' must be in [0, 5], got 9
    """
    whose = f"flips of {error_model} for {layer!r} must be"
    if not isinstance(flips, Tensor) or flips.dtype != torch.int64 or flips.dim() != 1 or flips.device != weight.device:
        got = type(flips).__name__
        if isinstance(flips, Tensor):
            got = f"one of shape {tuple(flips.shape)} and type {flips.dtype} on {flips.device}"
        raise TypeError(f"{whose} an int64 tensor of one dimension on {weight.device}, got {got}")
    if not len(flips):
        return flips
    if not _rising(flips):
        place = int((flips[1:] <= flips[:-1]).nonzero()[0])
        raise ValueError(f"{whose} sorted and distinct, got {flips[place : place + 2].tolist()} at place {place}")
    for index in (int(flips[0]), int(flips[-1])):
        if not 0 <= index < weight.numel():
            raise ValueError(f"{whose} in [0, {weight.numel() - 1}], got {index}")
    return flips


def checked_bit_rates(error_model: "ErrorModel", name: str) -> tuple[float, float]:
    """Return the rates of a stored 0 and a stored 1 of a weight, or raise ValueError if the error model says none.

    Example:
        >>> from bnnft.ber import Independent
        >>> checked_bit_rates(Independent(0.1), "fc1.weight")
        (0.1, 0.1)
    """
    rates = error_model.bit_rates(name)
    if rates is None:
        raise ValueError(
            f"the rates of stored bits of {error_model!r} in {name!r} are not known, so that nothing can be said of "
            "their mean: an error model says them by its method bit_rates(name)"
        )
    return rates


# versions of indices that were seen to rise: the map of a chip is the same tensor in each draw
_SEEN = WeakTensorKeyDictionary()


def _rising(indices: Tensor) -> bool:
    """Return whether each index is above the one before it; on a CPU by numpy, in half of torch's time."""
    version = None if indices.is_inference() else indices._version
    if version is not None and _SEEN.get(indices) == version:  # type: ignore[no-untyped-call]
        return True
    if indices.device.type == "cpu":
        array = indices.numpy()
        rises = bool((array[1:] > array[:-1]).all())
    else:
        rises = bool((indices[1:] > indices[:-1]).all())
    if rises and version is not None:
        _SEEN[indices] = version
    return rises
