"""Mean and variance over fault maps of sums and signs, in closed form.

Notation: ``p01`` and ``p10`` are the rates of a weight's stored bits, ``c = 1 - p01 - p10`` and ``d = p01 - p10``. A
weight ``w`` of -h or h reads as ``w'``, on average ``c w + d h``, and ``w'^2 = h^2``. An input ``a`` has mean ``e``
and second moment ``q`` (``x`` and ``x^2`` where it is certain). Bits and inputs count as independent.

- Linear layer: the mean of ``sum w' a`` is ``sum (c w + d h) e``, its variance ``sum h^2 q - (c w + d h)^2 e^2``.
- The same with the shift ``t sum(h a)`` subtracted, of compensation: with ``w' - t h`` in the place of ``w'``, whose
  mean is ``c w + (d - t) h`` and whose second moment is ``h^2 (1 - 2 t d + t^2) - 2 t c h w``, as ``w' h`` has the mean
  ``(c w + d h) h``. Both and the square of the mean are linear in ``w``, as ``w^2 = h^2``: one product with ``w`` each.
- Batch norm and other scales: mean and standard deviation are scaled.
- Sign: of a Gaussian with mean ``m`` and variance ``v``, ``e = 2 Phi(m / sqrt(v)) - 1``, the variance ``1 - e^2``.
- Sum of two branches: means and variances add.
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bnnft.compensation.correction import Correction

_LEAST = 1e-12  # of a variance, whose root has a gradient then
_CERTAIN = 1e-3  # a standard deviation of sums that is rounding
_NODES = 32  # of the quadrature over the true class's score
_ROOT = math.sqrt(2)


class Moments(NamedTuple):
    """Moments of a value over fault maps; each broadcasts to the value's shape.

    Attributes:
        mean: in the value's shape.
        deviation: standard deviation; ``None`` where it is that of ``second``.
        second: mean of the square, where it is known in itself, of binary outputs, say.
    """

    mean: Tensor
    deviation: Tensor | None = None
    second: Tensor | None = None

    @property
    def spread(self) -> Tensor:
        """The standard deviation."""
        if self.deviation is not None:
            return self.deviation
        assert self.second is not None
        return (self.second - self.mean.square()).clamp(min=_LEAST).sqrt()

    @property
    def square(self) -> Tensor:
        """The mean of the square."""
        return self.second if self.second is not None else self.spread.square() + self.mean.square()


class Errors(NamedTuple):
    """What a weight's bits suffer: rates of a stored 0 and a stored 1, and how sums with it are corrected."""

    rates: tuple[float, float]
    correction: Correction | None = None


def expected_sign(mean: Tensor, deviation: Tensor) -> Tensor:
    """Return the mean of the sign of a Gaussian, the sign itself where it is certain.

    Example:
        >>> expected_sign(torch.tensor([0.0, 1.0, -2.0]), torch.tensor([1.0, 1.0, 0.0]))
        tensor([ 0.0000,  0.6827, -1.0000])
    """
    certain = deviation <= _CERTAIN
    if not bool(certain.any()):
        return torch.erf(mean / (_ROOT * deviation))
    expected = torch.erf(mean / (_ROOT * deviation.masked_fill(certain, 1.0)))
    return torch.where(certain, torch.where(mean >= 0, 1.0, -1.0).to(mean.dtype), expected)


def sum_moments(operation: str, inputs: Moments, weight: Tensor, errors: Errors, sums: Tensor | None = None) -> Moments:
    """Return the moments of sums over weights and inputs, as derived above.

    Args:
        operation: ``linear``, or ``matmul`` and ``mm`` for weights from the right.
        inputs: shape (..., inputs).
        weight: clean, of -h and h with one h for each neuron.
        errors: of its bits.
        sums: of the weights with the means of the inputs, if they are known.

    Example:
        >>> inputs = Moments(torch.ones(1, 100), torch.zeros(()))
        >>> moments = sum_moments("linear", inputs, torch.ones(1, 100), Errors((0.0, 0.2)))
        >>> moments.mean, moments.deviation  # 100 x 0.6, and the root of 100 x (1 - 0.36)
        (tensor([[60.]]), tensor([[8.]]))
    """
    linear = operation == "linear"
    rows = weight if linear else weight.movedim(-1, 0)
    h = rows.detach().flatten(1)[:, 0].abs()
    h = h[:1] if bool((h == h[0]).all()) else h  # one for all
    (to_1, to_0), correction = errors
    c, d = 1 - to_1 - to_0, to_1 - to_0
    left, t = (1.0, 0.0) if correction is None else (correction.left, correction.shift)
    e, q = inputs.mean, inputs.square
    second, by_weight = 1 - 2 * t * d + t**2, -2 * t * c  # of the second moment: h^2 and h w
    squared, squared_by_weight = c**2 + (d - t) ** 2, 2 * c * (d - t)  # of the squared mean

    def product(values: Tensor) -> Tensor:
        return F.linear(values, weight) if linear else values @ weight

    mean = c / left * (product(e) if sums is None else sums)
    if d != t:
        mean = mean + (d - t) / left * h * e.sum(-1, keepdim=True)
    total = q.sum(-1, keepdim=True) if q.dim() else q * e.shape[-1]
    variance = h.square() * (second * total - squared * torch.linalg.vecdot(e, e)[..., None])
    if by_weight:
        of_weights = product(q) if q.dim() else q * rows.sum(tuple(range(1, rows.dim())))
        variance = variance + by_weight * h * of_weights
    if squared_by_weight:
        variance = variance - squared_by_weight * h * product(e.square())
    return Moments(mean, variance.clamp(min=_LEAST).sqrt() / left)


def probability_of_class(scores: Moments, targets: Tensor) -> Tensor:
    """Return the probability that the target's score is the highest, of independent Gaussian scores.

    ``integral of phi(z) prod over c of Phi((m_y + s_y z - m_c) / s_c)``, by Gauss and Hermite's quadrature. Where
    scores are certain, it is 1 or 0, and the first of equal ones is the answer.

    Args:
        scores: shape (N, C, ...).
        targets: shape (N, ...).

    Example:
        >>> scores = Moments(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        >>> probability_of_class(scores, torch.tensor([0, 1]))  # Phi(1 / sqrt(2)), and a tie
        tensor([0.7602, 0.0000])
    """
    mean = scores.mean.movedim(1, -1)
    deviation = scores.spread.expand_as(scores.mean).movedim(1, -1)
    certain = deviation.amax(-1) <= _CERTAIN
    deviation = deviation.masked_fill(certain[..., None], 1.0).clamp(min=_CERTAIN)
    at, (nodes, weights) = targets[..., None], _quadrature(mean)
    own = mean.gather(-1, at) + deviation.gather(-1, at) * nodes
    others = mean.scatter(-1, at, -1e6)  # the class itself is always below
    below = torch.special.ndtr((own[..., None, :] - others[..., None]) / deviation[..., None])
    total = (below.prod(-2) * weights).sum(-1)
    return torch.where(certain, (mean.argmax(-1) == targets).to(total.dtype), total)


@cache
def _nodes() -> tuple[list[float], list[float]]:
    nodes, weights = np.polynomial.hermite.hermgauss(_NODES)
    return (nodes * math.sqrt(2)).tolist(), (weights / math.sqrt(math.pi)).tolist()


def _quadrature(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of the mean over a standard normal number."""
    return tuple(torch.tensor(values, dtype=like.dtype, device=like.device) for values in _nodes())  # type: ignore[return-value]
