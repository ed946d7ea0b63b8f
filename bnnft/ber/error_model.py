"""What every error model is, and what they share: checks, stored bits, and the rate that is set from outside."""

import math
from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace
from numbers import Real
from typing import Any, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from bnnft.ber.random_bits import Key, where_true


@runtime_checkable
class ErrorModel(Protocol):
    """Anything that can say which stored bits of a weight read wrong.

    Write your own as a frozen dataclass: its fields become the parameters that ``conf/ber/NAME.yaml`` sets and
    that :class:`bnnft.callbacks.AccuracyOverBER` sweeps. Three attributes are looked at where they are there:

    - ``reads_bits = False``: the flips do not depend on what is stored. Then they are drawn before the forward that
      they go into, also where only this forward makes the bits.
    - ``rate``: the share of bits that read wrong where as many ones as zeros are stored (of stuck cells: the share
      of failing cells). Where it is no field, ``at_rate(rate)`` returns the same errors at another rate.
    - ``scale``: a field that multiplies all rates of an error model which has several.
    - ``source``: where its figures are published; said once at the start of a run.
    """

    def flips(self, weight: Tensor, key: Key) -> Tensor:
        """Return the sorted flat indices (int64, on the weight's device) of the stored bits that read wrong.

        Args:
            weight: the latent weight, any shape; its sign bits are the stored bits, bit 1 is weight +1.
            key: the stream of random bits for this weight and this draw.
        """
        ...


def reads_bits(model: ErrorModel) -> bool:
    """Tell whether the flips of an error model depend on the stored bits; they may unless it says that they do not."""
    return bool(getattr(model, "reads_bits", True))


def stored_ones(weight: Tensor, places: Tensor) -> Tensor:
    """Return for flat indices of a weight whether its stored bit is 1 there (weight +1), as bool.

    Example:
        >>> import torch
        >>> stored_ones(torch.tensor([0.5, -0.5, -0.0]), torch.tensor([0, 2]))
        tensor([ True, False])
    """
    return weight.detach().reshape(-1).index_select(0, places).signbit().logical_not_()


def at_rate(model: ErrorModel, rate: float) -> ErrorModel:
    """Return the same errors at another rate.

    Raises:
        TypeError: the error model has no rate to set.
        ValueError: it can't have this rate.

    Example:
        >>> from bnnft.ber import Asymmetric
        >>> at_rate(Asymmetric(rate_0_to_1=0.02, rate_1_to_0=0.01), 0.03)
        Asymmetric(rate_0_to_1=0.04, rate_1_to_0=0.02)
    """
    if has_field(model, "rate"):
        return replace(model, rate=rate)  # type: ignore[type-var]
    if hasattr(model, "at_rate"):
        changed: ErrorModel = model.at_rate(rate)
        return changed
    raise TypeError(f"{model!r} has no rate to set: it needs a field `rate` or a method `at_rate`")


def scaled(model: ErrorModel, factor: float) -> ErrorModel:
    """Return the same errors at a multiple of their rate.

    Raises:
        TypeError, ValueError: as :func:`at_rate`.

    Example:
        >>> from bnnft.ber import Independent
        >>> scaled(Independent(0.1), 0.5)
        Independent(rate=0.05)
    """
    if factor == 1:
        return model
    if has_field(model, "scale"):
        return replace(model, scale=factor * model.scale)  # type: ignore[type-var,attr-defined]
    return at_rate(model, factor * getattr(model, "rate", math.nan))


def checked_scale(scale: Any) -> float:
    """Return what multiplies all rates of several error models as a float, or raise ValueError if it is negative."""
    if isinstance(scale, bool) or not isinstance(scale, Real) or not 0 <= float(scale) < math.inf:
        raise ValueError(f"scale must be a number >= 0, got {scale!r}")
    return float(scale)


def sources(models: Iterable[ErrorModel]) -> str:
    """Return the published sources of several error models, each once, or nothing if there is none."""
    return "; ".join(dict.fromkeys(filter(None, (getattr(model, "source", "") for model in models))))


def check_layers(model: ErrorModel, names: Iterable[str]) -> None:
    """Raise ValueError if an error model that differs by layer does not fit these weights."""
    check = getattr(model, "check_layers", None)
    if check is not None:
        check(list(names))


def has_field(model: Any, name: str) -> bool:
    """Tell whether an error model has a parameter of this name that can be set."""
    return is_dataclass(model) and name in (field.name for field in fields(model) if field.init)


def in_one_list(first: Tensor, second: Tensor, size: int) -> Tensor:
    """Return the sorted indices below ``size`` that are in one of two lists only: a bit turned twice is right again.

    Example:
        >>> import torch
        >>> in_one_list(torch.tensor([1, 2]), torch.tensor([2, 5]), size=6)
        tensor([1, 5])
    """
    turned = torch.zeros(size, dtype=torch.bool, device=first.device)
    turned[first] = True
    turned[second] = ~turned[second]
    return where_true(turned)


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


def checked_chip(chip: Any) -> None:
    """Raise ValueError unless the number of a chip is an integer of at least 0, or ``None``."""
    if chip is not None and (isinstance(chip, bool) or not isinstance(chip, int) or chip < 0):
        raise ValueError(f"chip must be an integer >= 0, or null for another chip in each draw, got {chip!r}")
