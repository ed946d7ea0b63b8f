"""Fault maps of several error models, drawn once, and the model under one of them: what measuring needs of flips."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnnft.ber import ErrorModel, Key, check_layers
from bnnft.injection.activation import ActivationFlips, Target, checked_target, find_activations
from bnnft.injection.flipped import TurnedBits, draw_flips, is_none
from bnnft.injection.operand import Flips
from bnnft.injection.operands import OperandWatch
from bnnft.injection.sites import Site, Weights, binarized_weights, no_sites, watched_sites


@dataclass(frozen=True)
class Flipping:
    """Which bits are flipped, and from which seed.

    Args:
        seed: of the fault maps, >= 0; map ``m`` is ``draw=m`` of :func:`bnnft.flipped`.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.
        target: flip ``"weights"``, ``"activations"`` or ``"both"``.
        activations: patterns of names, see :func:`bnnft.injection.activation.find_activations`.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    seed: int = 0
    weights: Weights | None = None
    target: Target = "weights"
    activations: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        checked_target(self.target)
        Key(self.seed)  # raises if the seed is none


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

    The flips of weights are drawn once, in the first batch; those of activations in each. Slot 0 is the clean run, and
    map ``m`` of point ``p`` has slot ``1 + p * maps + m``.

    Args:
        model: any module with binarized weights; of layers that nobody knows they are found in the first batch.
        models: one error model for each point of the curve.
        maps: fault maps at each point, >= 1.
        flipping: which bits, and the seed.

    Raises:
        TypeError, ValueError: an argument is out of range; the model has no such weights or activations.
    """

    def __init__(self, model: nn.Module, models: Sequence[ErrorModel], maps: int, flipping: Flipping) -> None:
        checked_maps(maps)
        self.model, self.models, self.maps, self.flipping = model, models, maps, flipping
        if flipping.target != "activations":
            binarized_weights(model, flipping.weights)  # raises for a pattern that matches nothing
        self._activations = [] if flipping.target == "weights" else find_activations(model, flipping.activations)
        self._sites: list[Site] = []
        self.flips: list[list[dict[str, Flips]]] = []

    @property
    def slots(self) -> int:
        """Number of scores: one for each map, and the clean one."""
        return 1 + len(self.models) * self.maps

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next((weight.device for weight in self.model.parameters()), torch.device("cpu"))

    def draw(self, forward: Callable[[], Any]) -> list[Run]:
        """Find the weights by one forward, draw all maps, and return which runs they need.

        Maps without a flip are the clean run, and maps of a point that are equal, as those of one chip, are one run.
        """
        if self.flipping.target != "activations":
            self._sites = evaluation_sites(self.model, self.flipping.weights, forward)
        for error_model in self.models:
            check_layers(error_model, [*(site.name for site in self._sites), *self._activations])
        seed = self.flipping.seed
        self.flips = [
            [draw_flips(self._sites, model, Key(seed, number)) for number in range(self.maps)] for model in self.models
        ]
        runs = [Run(None, [0])]
        for point, maps in enumerate(self.flips):
            for number, flips in enumerate(maps):
                same = self._same_run(runs, flips, point)
                if same is None:
                    runs.append(same := Run((point, number), []))
                same.slots.append(1 + point * self.maps + number)
        return runs

    def _same_run(self, runs: Sequence[Run], flips: Mapping[str, Flips], point: int) -> Run | None:
        """Return the run that a map can share."""
        if self._activations:
            return None
        if all(map(is_none, flips.values())):
            return runs[0]
        first = next((run for run in runs if run.map == (point, 0)), None)
        return first if first is not None and _equal(flips, self.flips[point][0]) else None

    @contextmanager
    def under(self, run: Run, batch: int) -> Iterator[None]:
        """Flip the bits of one map while the model runs on batch number ``batch``."""
        if run.map is None:
            yield
            return
        point, number = run.map
        key = Key(self.flipping.seed, number).part(batch)
        with ExitStack() as stack:
            stack.enter_context(ActivationFlips(self.model, self._activations, self.models[point], key))
            stack.callback(TurnedBits(self._sites, self.flips[point][number], model=self.model).restore)
            yield


def _equal(flips: Mapping[str, Flips], other: Mapping[str, Flips]) -> bool:
    pairs = [(flips[name], other[name]) for name in flips]
    return all(isinstance(one, Tensor) and isinstance(two, Tensor) and torch.equal(one, two) for one, two in pairs)


def evaluation_sites(model: nn.Module, weights: Weights | None, forward: Callable[[], Any]) -> list[Site]:
    """Return the binarized weights of a model, also of layers that nobody knows, by watching one forward.

    Weights of the latter get their flips in the operand: that is exact whatever the layer does.

    Raises:
        ValueError: there are none.
    """
    binarized_weights(model, weights)  # raises for a pattern that matches nothing
    watch = OperandWatch(model)
    with watch:
        forward()
    sites = watched_sites(model, watch, weights)
    if not sites:
        raise no_sites(model)
    return [site._replace(in_operand=not site.known and site.operand is not None) for site in sites]


def checked_maps(maps: int) -> None:
    """Raise ValueError unless the number of fault maps is an integer of at least 1."""
    if not isinstance(maps, int) or isinstance(maps, bool) or maps < 1:
        raise ValueError(f"maps must be an integer >= 1, got {maps!r}")
