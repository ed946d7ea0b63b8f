"""Accuracy over bit error rate, measured: fault maps at several rates, in one pass over the data."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bnnft.ber import ErrorModel, Key
from bnnft.evaluation.curve import BERCurve
from bnnft.evaluation.points import curve_axis, error_models
from bnnft.injection.activation import Target, checked_target
from bnnft.injection.flipped import How, Injection, draw_flips, is_none
from bnnft.injection.operand import Drawn
from bnnft.injection.sites import Weights


class AccuracyMeter:
    """Counts right answers under every fault map, batch by batch.

    The flips of all maps are drawn once, in the first batch; those of activations in each. Maps without a flip are the
    clean run, and maps that are equal, as those of one chip, are run once.

    Args:
        model: any module with binarized weights; of layers that nobody knows they are found in the first batch.
        models: one error model for each point of the curve.
        maps: fault maps at each point, >= 1.
        seed: of the maps; map ``m`` is ``draw=m`` of :func:`bnnft.flipped`.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.
        target: flip ``"weights"``, ``"activations"`` or ``"both"``.
        activations: patterns of names, see :func:`bnnft.injection.activation.find_activations`.

    Raises:
        TypeError, ValueError: an argument is out of range; the model has no such weights or activations.
    """

    def __init__(
        self,
        model: nn.Module,
        models: Sequence[ErrorModel],
        maps: int,
        seed: int = 0,
        weights: Weights | None = None,
        target: Target = "weights",
        activations: Sequence[str] | None = None,
        how: How = "auto",
    ) -> None:
        checked_maps(maps)
        checked_target(target)
        Key(seed)  # raises if the seed is none
        self.model, self.models, self.seed, self.weights, self.target = model, models, seed, weights, target
        self.injection = Injection(model, weights, how, target, activations)
        self.activations = self.injection.neurons
        self.flips: list[list[dict[str, Drawn]]] = []
        self._repeats: list[list[bool]] = []  # of each map, whether it is equal to the first of its point
        device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
        self.right = torch.zeros(len(models), maps, dtype=torch.int64, device=device)
        self.clean_right = torch.zeros((), dtype=torch.int64, device=device)
        self.total = torch.zeros((), dtype=torch.int64, device=device)
        self._batches = 0

    def update(self, correct: Callable[[], Tensor]) -> None:
        """Run one batch clean and under every map.

        Args:
            correct: runs the model on the batch and returns for each answer whether it is right, as bool.
        """
        if not self.flips:
            self._draw(correct)
        right = correct()
        self.total += right.numel()
        clean = right.sum()
        self.clean_right += clean
        for point, maps in enumerate(self.flips):
            answers: list[Tensor] = []
            for number, flips in enumerate(maps):
                if self._repeats[point][number]:
                    answers.append(answers[0])
                elif not self.activations and all(map(is_none, flips.values())):
                    answers.append(clean)
                else:
                    answers.append(self._under(flips, self.models[point], number, correct))
                self.right[point, number] += answers[-1]
        self._batches += 1

    def _draw(self, forward: Callable[[], Any]) -> None:
        if self.target != "activations":
            with self.injection.finder:
                forward()
            self.injection.learn()
            self.injection.finder.settle()
        for error_model in self.models:
            error_model.check_layers([*(site.name for site in self.injection.sites), *self.activations])
        draws = range(self.right.shape[1])
        self.flips = [
            [draw_flips(self.injection.sites, each, Key(self.seed, draw)) for draw in draws] for each in self.models
        ]
        self._repeats = [
            [draw > 0 and not self.activations and _equal(flips, maps[0]) for draw, flips in enumerate(maps)]
            for maps in self.flips
        ]

    def _under(self, flips: Mapping[str, Drawn], model: ErrorModel, draw: int, correct: Callable[[], Tensor]) -> Tensor:
        """Return how many answers are right under one map."""
        key = Key(self.seed, draw).part(self._batches)
        with self.injection.under(flips, model, key):
            return correct().sum()

    def curve(self, rates: Sequence[float], axis: str = "rate") -> BERCurve:
        """Return the accuracies of everything counted so far.

        Raises:
            ValueError: that is nothing.
        """
        if not self.total:
            raise ValueError("accuracy over BER needs data, but got no batch")
        accuracy = self.right.cpu().to(torch.float64) / int(self.total)
        return BERCurve(tuple(map(float, rates)), accuracy, int(self.clean_right) / int(self.total), axis)


def _equal(flips: Mapping[str, Drawn], other: Mapping[str, Drawn]) -> bool:
    pairs = [(flips[name], other[name]) for name in flips]
    return all(isinstance(one, Tensor) and isinstance(two, Tensor) and torch.equal(one, two) for one, two in pairs)


def checked_maps(maps: int) -> None:
    """Raise ValueError unless the number of fault maps is an integer of at least 1."""
    if not isinstance(maps, int) or isinstance(maps, bool) or maps < 1:
        raise ValueError(f"maps must be an integer >= 1, got {maps!r}")


def classified_correctly(model: nn.Module, batch: Any) -> Tensor:
    """Return for each sample of a batch ``(inputs, targets)`` whether the highest score is the target's."""
    inputs, targets = batch
    right: Tensor = model(inputs).argmax(1) == targets
    return right


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def accuracy_over_ber(
    model: nn.Module,
    dataloader: Iterable[Any],
    rates: Iterable[float] | None = None,
    maps: int = 5,
    seed: int = 0,
    *,
    error_model: float | ErrorModel | None = None,
    axis: str | None = None,
    weights: Weights | None = None,
    target: Target = "weights",
    activations: Sequence[str] | None = None,
    how: How = "auto",
    correct: Callable[[nn.Module, Any], Tensor] = classified_correctly,
) -> BERCurve:
    """Measure a classifier's accuracy over bit error rates, in eval mode and one pass over the data.

    Args:
        model: any module with binarized weights, of known layers or not (those are found in the first batch).
        dataloader: yields batches ``(inputs, targets)``, which are moved to the device of the weights.
        rates: strictly ascending bit error rates in [0, 1]; values of another parameter from the fewest errors to the
            most.
        maps: fault maps at each rate, >= 1. A map is shared by all samples, as in a memory.
        seed: of the fault maps, >= 0.
        error_model: whose parameter ``axis`` takes the rates; independent flips if ``None``.
        axis: the parameter of the error model that ``rates`` sets.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.
        target: flip ``"weights"``, ``"activations"`` (anew in each batch) or ``"both"``.
        activations: patterns of names, see :func:`bnnft.injection.activation.find_activations`.
        how: where bits are flipped, see :func:`bnnft.flipped`.
        correct: for other batches or answers: ``correct(model, batch)`` returns a bool for each answer.

    Returns:
        The curve, with the clean accuracy. Model, training mode and random streams are as before.

    Raises:
        TypeError, ValueError: an argument is out of range, or the model has no such weights.

    Example:
        >>> from bnnft.nn import BinaryLinear
        >>> model, x = BinaryLinear(64, 4, bias=False), torch.randn(256, 64).sign()
        >>> data = [(x, model(x).argmax(1))]
        >>> curve = accuracy_over_ber(model, data, rates=[0, 0.5], maps=3)
        >>> curve.mean[0], curve.mean[1] < 0.5
        (1.0, True)
    """
    axis, rates = curve_axis(rates, error_model, axis)
    models = error_models(rates, error_model, axis)
    meter = AccuracyMeter(model, models, maps, seed, weights, target, activations, how)
    device = meter.total.device
    # a loader draws from torch's generator when its iteration starts
    with _in_eval_mode(model), torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for batch in dataloader:
            moved = tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
            meter.update(partial(correct, model, moved))
    return meter.curve(rates, axis)
