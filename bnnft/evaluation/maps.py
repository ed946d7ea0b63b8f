"""Fault maps of several error models, drawn once, and the model under one of them: what measuring needs of flips."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnnft.ber import ErrorModel, Key, checked_choice
from bnnft.compensation import Method, as_method
from bnnft.injection.activation import Target, checked_target
from bnnft.injection.injection import Injection, draw_flips, is_none
from bnnft.injection.operand import Drawn
from bnnft.injection.places import How
from bnnft.injection.remarks import without_flips
from bnnft.injection.sites import Weights, checked_weights, no_sites
from bnnft.tracing.compiled import compiled_modules
from bnnft.tracing.state import unchanged


@dataclass(frozen=True)
class Flipping:
    """Which bits are flipped, and from which seed.

    Args:
        seed: of the fault maps, >= 0; map ``m`` is ``draw=m`` of :func:`bnnft.flipped`.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.
        target: flip ``"weights"``, ``"activations"`` or ``"both"``.
        activations: patterns of names, see :func:`bnnft.injection.activation.find_activations`.
        how: where bits are flipped, see :func:`bnnft.flipped`.
        compensation: of their errors, see :class:`bnnft.compensation.Method`: a kind, several, or a method.

    Raises:
        TypeError, ValueError: an argument is out of range; activations are flipped, whose errors are not compensated.
    """

    seed: int = 0
    weights: Weights | None = None
    target: Target = "weights"
    activations: Sequence[str] | None = None
    how: How = "auto"
    compensation: str | Sequence[str] | Method | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        checked_target(self.target, self.activations)
        checked_weights(self.weights)
        checked_choice(self.how, How, "how")
        Key(self.seed)  # raises if the seed is none
        if self.compensation is None or isinstance(self.compensation, Mapping):  # an empty one is no method in a config
            object.__setattr__(self, "compensation", None)
        elif self.target != "weights":
            raise ValueError(f"compensation is of errors in weights: target must be 'weights', got {self.target!r}")
        else:
            object.__setattr__(self, "compensation", as_method(self.compensation))


class Run(NamedTuple):
    """One forward of each batch, and whose scores it stands for.

    Attributes:
        map: point and number of the map; ``None`` for the clean run.
        slots: of the tally.
    """

    map: tuple[int, int] | None
    slots: list[int]


class FaultMaps:
    """The fault maps of several error models for one model.

    The flips of a weight are drawn once, in the first batch that runs it; those of activations in each. Slot 0 is the
    clean run, and map ``m`` of point ``p`` has slot ``1 + p * maps + m``.

    Args:
        model: any module with binarized weights; of layers that nobody knows they are found when they first run.
        models: one error model for each point of the curve.
        maps: fault maps at each point, >= 1.
        flipping: which bits, and the seed.

    Attributes:
        runs: of each batch, the clean one first.
        apart: maps without a flip are another run than the clean one.

    Raises:
        TypeError, ValueError: an argument is out of range; the model has no such weights or activations.
    """

    apart = False

    def __init__(self, model: nn.Module, models: Sequence[ErrorModel], maps: int, flipping: Flipping) -> None:
        checked_maps(maps)
        self.model, self.models, self.maps, self.flipping = model, models, maps, flipping
        options = (flipping.weights, flipping.how, flipping.target, flipping.activations)
        self.injection = Injection(model, *options)
        self.flips: list[list[dict[str, Drawn]]] = []
        self.runs: list[Run] = []
        self._seen = 0  # weights that were found

    @property
    def remark(self) -> str:
        """What a reader must know of the flips, nothing in most cases."""
        return "; ".join(without_flips(self.injection.finder))

    @property
    def wanted(self) -> int:
        """Number of samples to see before the first one is measured."""
        return 0

    def show(self, forwards: Sequence[Callable[[], Any]]) -> None:
        """Take what runs the first batches."""

    @property
    def slots(self) -> int:
        """Number of scores: one for each map, and the clean one."""
        return 1 + len(self.models) * self.maps

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next((weight.device for weight in self.model.parameters()), torch.device("cpu"))

    def clean(self, forward: Callable[[], Any]) -> Any:
        """Run a batch without flips and return what the run does; weights that are new are found and drawn."""
        finder = self.injection.finder
        if self.flipping.target == "activations" or (self.runs and compiled_modules(self.model)):
            with unchanged(self.model, parameters=False):
                result = forward()
        else:
            with unchanged(self.model, parameters=False), self.injection.looking():
                result = forward()
        if not self.runs or len(finder.findings.uses) > self._seen:
            self._draw()
        return result

    def under(self, run: Run, batch: int, forward: Callable[[], Any]) -> Any:
        """Run batch number ``batch`` under one map and return what the run does, again if its flips were not exact."""
        assert run.map is not None
        point, number = run.map
        key = Key(self.flipping.seed, number).part(batch)
        while True:
            flips = self.flips[point][number]
            due = self.injection.is_due(flips)
            under = self.injection.under(flips, self.models[point], key, watch=due)
            with unchanged(self.model, parameters=False), under:
                result = forward()
            if not self.injection.conclude():
                return result
            self._draw()

    def _draw(self) -> None:
        """Draw all maps, and take down which runs they need.

        Maps without a flip are the clean run, and maps of a point that are equal, as those of one chip, are one run.

        Raises:
            ValueError: there are no weights.
        """
        injection, seed = self.injection, self.flipping.seed
        if self.flipping.target != "activations":
            injection.learn()
            self._seen = len(injection.finder.findings.uses)
            if not injection.sites:
                raise no_sites(self.model)
        for error_model in self.models:
            injection.check_layers(error_model)
        self.flips = [
            [draw_flips(injection.sites, model, Key(seed, number)) for number in range(self.maps)]
            for model in self.models
        ]
        self.runs = [Run(None, [0])]
        for point, maps in enumerate(self.flips):
            for number, flips in enumerate(maps):
                same = self._same_run(self.runs, flips, point)
                if same is None:
                    self.runs.append(same := Run((point, number), []))
                same.slots.append(1 + point * self.maps + number)

    def _same_run(self, runs: Sequence[Run], flips: Mapping[str, Drawn], point: int) -> Run | None:
        """Return the run that a map can share."""
        if self.injection.neurons:
            return None
        if all(map(is_none, flips.values())) and not self.apart:
            return runs[0]
        first = next((run for run in runs if run.map == (point, 0)), None)
        return first if first is not None and _equal(flips, self.flips[point][0]) else None


def _equal(flips: Mapping[str, Drawn], other: Mapping[str, Drawn]) -> bool:
    pairs = [(flips[name], other[name]) for name in flips]
    return all(isinstance(one, Tensor) and isinstance(two, Tensor) and torch.equal(one, two) for one, two in pairs)


def checked_maps(maps: int) -> None:
    """Raise ValueError unless the number of fault maps is an integer of at least 1."""
    if not isinstance(maps, int) or isinstance(maps, bool) or maps < 1:
        raise ValueError(f"maps must be an integer >= 1, got {maps!r}")
