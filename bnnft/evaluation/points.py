"""The points of a curve: what it goes over, and the error model at each of its values."""

from collections.abc import Iterable
from itertools import pairwise
from numbers import Real
from typing import Any

from bnnft.ber import ErrorModel, as_error_model


def error_models(
    rates: Iterable[float] | None = None, error_model: float | ErrorModel | None = None, axis: str | None = None
) -> list[ErrorModel]:
    """Return the error model once for each point of a curve.

    Args:
        rates: strictly ascending rates, or values of another parameter, from the fewest errors to the most; the points
            of the error model if ``None``.
        error_model: a bit error rate or an error model; independent flips if ``None``.
        axis: the parameter; ``"rate"`` for all error models that have a rate, if only the mean of several; the axis of
            the error model if ``None``.

    Raises:
        TypeError, ValueError: no rates, not in order, or out of range; the error model has no such parameter.

    Example:
        >>> error_models([0, 0.1])
        [Independent(rate=0.0), Independent(rate=0.1)]
    """
    template = as_error_model(0.0 if error_model is None else error_model)
    axis, rates = curve_axis(rates, template, axis)
    up, down = (all(low < high for low, high in pairwise(order)) for order in (rates, rates[::-1]))
    if not rates or not (up or (down and axis not in ("rate", "scale"))):
        order = "ascending" if axis in ("rate", "scale") else "ascending or descending"
        raise ValueError(f"rates must be a list of one or more strictly {order} numbers, got {rates!r}")
    models = [template.at(axis, rate) for rate in rates]
    growing = [model.rate for model in models if model.rate is not None]
    if any(high < low for low, high in pairwise(growing)):
        raise ValueError(f"rates must go from the fewest errors to the most, got {rates!r} for axis {axis!r}")
    return models


def curve_axis(
    rates: Iterable[float] | None, error_model: float | ErrorModel | None, axis: str | None
) -> tuple[str, list[float]]:
    """Return the parameter that a curve goes over, and its values: those of the error model unless they are given.

    Raises:
        TypeError: the rates are no list of numbers.
        ValueError: only the axis is given, and it isn't the error model's.

    Example:
        >>> from bnnft.ber import Sram65
        >>> curve_axis(None, Sram65(), None)
        ('voltage', [0.55, 0.54, 0.53, 0.52, 0.51, 0.5])
    """
    template = as_error_model(0.0 if error_model is None else error_model)
    axis = template.axis if axis is None else axis
    if rates is None:
        if axis != template.axis:
            raise ValueError(f"rates must be given for axis {axis!r}: the points of {template!r} are a {template.axis}")
        rates = template.points
    given: Any = rates
    values = list(given) if isinstance(given, Iterable) else [given]
    if not isinstance(given, Iterable) or any(isinstance(v, bool) or not isinstance(v, Real) for v in values):
        raise TypeError(f"rates must be a list of numbers, got {given!r}")
    return axis, values
