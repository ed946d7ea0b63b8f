"""Fault maps under which a model runs compensated."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from bnnft.ber import ErrorModel, Independent, Key
from bnnft.compensation.compensator import Compensator
from bnnft.compensation.correction import Statistics
from bnnft.compensation.method import as_method
from bnnft.evaluation.maps import FaultMaps, Flipping, Run
from bnnft.injection.injection import draw_flips

_NO_ERRORS = Independent(0.0)


class CompensatedMaps(FaultMaps):
    """Fault maps whose errors are compensated in each run; the clean run is compensated for no errors.

    Args:
        model, models, maps, flipping: as of :class:`bnnft.evaluation.maps.FaultMaps`. Recalibration takes its samples
            from the first batches that are measured, without their labels, under each map anew; in a distributed run
            from those of each process.

    Raises:
        TypeError, ValueError: as there.
    """

    apart = True

    def __init__(self, model: nn.Module, models: Sequence[ErrorModel], maps: int, flipping: Flipping) -> None:
        super().__init__(model, models, maps, flipping)
        self._compensator = Compensator(model, as_method(flipping.compensation or "auto"), flipping.weights, data=True)
        self._statistics: dict[tuple[int, int] | None, dict[str, Statistics]] = {}
        self._samples: list[Callable[[], Any]] = []

    @property
    def wanted(self) -> int:
        """Number of samples to see before the first one is measured."""
        method = self._compensator.method
        return method.samples if method.recalibrates or method.auto else 0

    def show(self, forwards: Sequence[Callable[[], Any]]) -> None:
        """Find what can be corrected, and keep the forwards of the first batches for recalibration."""
        self._compensator.look(forwards[0])
        self._samples = list(forwards)

    def clean(self, forward: Callable[[], Any]) -> Any:
        """Run a batch without flips, compensated for no errors."""
        if self._compensator.plan is None:
            self.show([forward])

        def compensated() -> Any:
            self._gather(None, _NO_ERRORS)
            with self._compensator.under(_NO_ERRORS, self._statistics.get(None)):
                return forward()

        return super().clean(compensated)

    def under(self, run: Run, batch: int, forward: Callable[[], Any]) -> Any:
        """Run a batch under one map, compensated for its error model."""
        assert run.map is not None
        place, error_model = run.map, self.models[run.map[0]]
        if self._compensator.method.die == "other" and place not in self._statistics:
            key = Key(self.flipping.seed, place[1], purpose="otherdie")
            flips = draw_flips(self.injection.sites, error_model, key)
            with self.injection.under(flips, error_model, key):
                self._gather(place, error_model)

        def compensated() -> Any:
            self._gather(place, error_model)
            with self._compensator.under(error_model, self._statistics.get(place)):
                return forward()

        return super().under(run, batch, compensated)

    def _gather(self, place: tuple[int, int] | None, error_model: ErrorModel) -> None:
        """Gather the statistics of a map, under the flips that the model runs with now, once."""
        compensator = self._compensator
        if place in self._statistics or not compensator.norms:
            return
        if compensator.method.auto and not compensator.is_needed(error_model):
            return
        self._statistics[place] = statistics = dict[str, Statistics]()
        context: AbstractContextManager[None] = compensator.gathering(error_model, statistics)
        with context:
            for sample in self._samples:
                sample()


def fault_maps(model: nn.Module, models: Sequence[ErrorModel], maps: int, flipping: Flipping) -> FaultMaps:
    """Return fault maps, whose errors are compensated where that is asked for; arguments as of both classes."""
    return (FaultMaps if flipping.compensation is None else CompensatedMaps)(model, models, maps, flipping)
