"""How the bit error rate moves over training.

A schedule is a pure function of the step, as flips are: a run that resumes goes on where it was.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from bnnft.ber.random_bits import Key, uniforms


@runtime_checkable
class Schedule(Protocol):
    """Anything that says which part of its rate an error model has at a step."""

    def factor(self, step: int, seed: int = 0) -> float:
        """Return what the rate is multiplied by, a fraction in [0, 1].

        Args:
            step: number of the training batch, from 0 on.
            seed: of the flips, for schedules that draw.
        """
        ...


def checked_schedule(schedule: Any) -> None:
    """Raise TypeError unless the argument is a schedule or ``None``."""
    if schedule is not None and (isinstance(schedule, type) or not isinstance(schedule, Schedule)):
        raise TypeError(f"schedule must have a method factor(step, seed), as those of bnnft.ber, got {schedule!r}")


@dataclass(frozen=True)
class Constant:
    """The whole rate at every step.

    Example:
        >>> Constant().factor(5)
        1.0
    """

    def factor(self, step: int, seed: int = 0) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True)
class _WarmUp:
    """A rate that rises from a part of it to the whole one, and stays."""

    steps: int
    start: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"steps must be an integer >= 1, got {self.steps!r}")
        _check_fraction(self.start, "start")

    def factor(self, step: int, seed: int = 0) -> float:
        """Return the fraction of the rate at a step."""
        return self.start + (1 - self.start) * self._risen(min(step / self.steps, 1.0))

    def _risen(self, part: float) -> float:
        """Return how far the rate has risen after this part of the warm-up."""
        return part


@dataclass(frozen=True)
class Linear(_WarmUp):
    """A rate that rises linearly, and stays.

    Args:
        steps: training batches until the whole rate is reached, >= 1.
        start: fraction of the rate at the first step, in [0, 1].

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> [Linear(steps=4).factor(step) for step in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """


@dataclass(frozen=True)
class Cosine(_WarmUp):
    """A rate that rises along half a cosine, slow at both ends, and stays.

    Args:
        steps: training batches until the whole rate is reached, >= 1.
        start: fraction of the rate at the first step, in [0, 1].

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> [round(Cosine(steps=4).factor(step), 3) for step in (0, 1, 2, 4, 9)]
        [0.0, 0.146, 0.5, 1.0, 1.0]
    """

    def _risen(self, part: float) -> float:
        return (1 - math.cos(math.pi * part)) / 2


@dataclass(frozen=True)
class Steps:
    """A rate that jumps at certain steps.

    Args:
        factors: the fraction of the rate, in [0, 1], from each step (>= 0) on; 0 before the first one. If ``None``, a
            quarter of the rate from step 0, half of it from step 100 and all of it from step 200 on.

    Raises:
        TypeError, ValueError: no mapping, or out of range.

    Example:
        >>> [Steps({0: 0.1, 100: 0.5, 200: 1.0}).factor(step) for step in (0, 99, 100, 500)]
        [0.1, 0.1, 0.5, 1.0]
    """

    factors: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        factors = {0: 0.25, 100: 0.5, 200: 1.0} if self.factors is None else self.factors
        if not isinstance(factors, Mapping) or not factors:
            raise TypeError(f"factors must map one or more steps to fractions of the rate, got {factors!r}")
        for step, factor in factors.items():
            if not isinstance(step, int) or step < 0:
                raise ValueError(f"factors must have steps >= 0, got {step!r}")
            _check_fraction(factor, f"factors[{step}]")
        object.__setattr__(self, "factors", dict(factors))

    def factor(self, step: int, seed: int = 0) -> float:
        """Return the fraction of the rate at a step."""
        assert self.factors is not None
        begun = [first for first in self.factors if first <= step]
        return float(self.factors[max(begun)]) if begun else 0.0


@dataclass(frozen=True)
class Uniform:
    """A rate drawn anew in each step, uniform between 0 and the whole one.

    Example:
        >>> [round(Uniform().factor(step, seed=1), 2) for step in range(4)]
        [0.3, 0.66, 0.8, 0.78]
    """

    def factor(self, step: int, seed: int = 0) -> float:
        """Return the fraction of the rate at a step of a run with this seed."""
        return float(uniforms(Key(seed, step, purpose="schedule").stream(), 0, 1))


@dataclass(frozen=True)
class Curriculum:
    """No flips until the network has learned: then another schedule, from the step on at which the loss was low.

    That step is what a run found, and the one thing about schedules that is kept in checkpoints.

    Args:
        loss_below: the flips begin after the first batch whose training loss is below this number, > 0.
        then: schedule that begins there; the whole rate at once if ``None``.

    Raises:
        TypeError, ValueError: ``loss_below`` is no positive number, ``then`` is no schedule.

    Example:
        >>> Curriculum(loss_below=0.5, then=Linear(steps=4)).factor(step=2)  # two batches after the beginning
        0.5
    """

    loss_below: float
    then: Schedule | None = None

    def __post_init__(self) -> None:
        if isinstance(self.loss_below, bool) or not isinstance(self.loss_below, float | int) or not self.loss_below > 0:
            raise ValueError(f"loss_below must be a number greater than 0, got {self.loss_below!r}")
        checked_schedule(self.then)

    def factor(self, step: int, seed: int = 0) -> float:
        """Return the fraction of the rate so many steps after the beginning."""
        return 1.0 if self.then is None else self.then.factor(step, seed)


def _check_fraction(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, float | int) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a fraction of the rate in [0, 1], got {value!r}")
