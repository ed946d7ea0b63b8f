"""Curves of several runs that go into one table or figure, and how their numbers are shown."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bnnft.evaluation.curve import FRACTION, BERCurve
from bnnft.evaluation.names import CurveNames
from bnnft.plots import axis_title, axis_unit, is_rate, score_title
from bnnft.runs.job import Job
from bnnft.runs.results import Result


@dataclass(frozen=True)
class CurveKind:
    """What the curves of one table or figure have in common.

    Attributes:
        key: of the curves among those of a run, see :attr:`bnnft.runs.results.Result.curves`.
        names: their score, axis and name.
        higher_is_better: of the score.
        percent: the score is a fraction, shown in percent.
    """

    key: str = ""
    names: CurveNames = field(default_factory=CurveNames)
    higher_is_better: bool | None = True
    percent: bool = True

    def of(self, result: Result | None) -> BERCurve | None:
        """Return a run's curve of this kind, if it has one."""
        curve = None if result is None else result.curves.get(self.key)
        if curve is None or (curve.axis, curve.score) != (self.names.axis, self.names.score):
            return None
        return curve

    def clean(self, result: Result) -> float:
        """Return the score without flips, NaN if it was not measured."""
        if (curve := self.of(result)) is not None:
            return curve.clean
        return result.clean if self.names.score == "accuracy" else math.nan

    def tolerable(self, result: Result) -> float:
        """Return the tolerable BER, or what else the curve is over, NaN if it is not known."""
        return math.nan if self.of(result) is None else result.metrics.get(f"test/{self.names.tolerable}", math.nan)

    def bound(self, result: Result) -> str:
        """Return the sign before a tolerable BER that is a bound, since the curve never fell; else nothing."""
        curve = self.of(result)
        if curve is None or not result.metrics.get(f"test/{self.names.tolerable}_is_lower_bound"):
            return ""
        return "≤" if curve.rates[-1] < curve.rates[0] else "≥"

    def score(self, value: float) -> str:
        """Return a score for people, without its unit; nothing for NaN."""
        return percent(value) if self.percent else "" if math.isnan(value) else f"{value:.4g}"

    def tolerable_text(self, result: Result) -> str:
        """Return the tolerable BER of a run for people, without its unit; nothing where it is not known."""
        value = self.tolerable(result)
        if math.isnan(value):
            return ""
        shown = percent(value) if is_rate(self.names.axis) else f"{value:.3g}"
        return f"{self.bound(result)} {shown}".strip()

    @property
    def score_title(self) -> str:
        """What the score is called, with its unit and direction."""
        return score_title(self.names.score, self.higher_is_better, self.percent)

    @property
    def tolerable_name(self) -> str:
        """What the tolerable value is called, without its unit."""
        return "tolerable BER" if self.names.axis == "rate" else f"tolerable {self.names.axis.replace('_', ' ')}"

    @property
    def tolerable_title(self) -> str:
        """What the tolerable value is called, with its unit.

        Example:
            >>> CurveKind().tolerable_title, CurveKind(names=CurveNames(axis="voltage")).tolerable_title
            ('tolerable BER (%)', 'tolerable voltage (V)')
        """
        return axis_title(self.names.axis, self.tolerable_name)

    @property
    def tolerable_unit(self) -> str:
        """The unit of the tolerable value."""
        return axis_unit(self.names.axis)


def kind_of(key: str, curve: BERCurve) -> CurveKind:
    """Return the kind of a curve that a run has under this key."""
    return CurveKind(key, curve.names, curve.higher_is_better, curve.bounds == FRACTION)


def curve_kinds(jobs: Sequence[Job]) -> list[CurveKind]:
    """Return what curves some runs have, one kind for each key, as the first run with such a curve has it.

    There is one at least, also where no run has a curve.
    """
    kinds: dict[str, CurveKind] = {}
    for _, key, curve in _curves(jobs):
        kinds.setdefault(key, kind_of(key, curve))
    return list(kinds.values()) or [CurveKind()]


def left_out(jobs: Sequence[Job], names: Sequence[str]) -> list[str]:
    """Say which runs have a curve that can't be in one figure with the others of its key.

    Args:
        jobs: the runs.
        names: what each is called.
    """
    kinds = {kind.key: kind for kind in curve_kinds(jobs)}
    said = []
    for number, key, curve in _curves(jobs):
        common, label = kinds[key].names, names[number]
        if curve.axis != common.axis:
            fault = f"its curve is over {curve.axis}, not {common.axis}"
        elif curve.score != common.score:
            fault = f"its curve shows {curve.score}, not {common.score}"
        else:
            continue
        said.append(f"{label}: {fault}; a report of its own shows it")
    return said


def _curves(jobs: Sequence[Job]) -> Iterator[tuple[int, str, BERCurve]]:
    """Yield number of the run, key and curve of all curves."""
    for number, job in enumerate(jobs):
        for key, curve in job.result.curves.items() if job.result else ():
            yield number, key, curve


def percent(fraction: float) -> str:
    """Return a fraction in percent, nothing for NaN."""
    return "" if math.isnan(fraction) else f"{100 * fraction:.1f}"
