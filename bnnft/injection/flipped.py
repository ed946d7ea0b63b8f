"""Turn stored bits of a model's weights, and put them back bit for bit.

The stored bit is the sign bit of the latent weight. Turning it is one exclusive or with the sign bit, in place,
at the drawn positions only; turning it again restores every float, zeros and NaN included.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bnnft.ber import ErrorModel, Key, as_error_model, check_layers, checked_choice, reads_bits
from bnnft.injection.activation import ActivationFlips, Target, checked_target, find_activations
from bnnft.injection.operand import Flips, OperandFlips
from bnnft.injection.saves import hold, release
from bnnft.injection.signs import flip_signs
from bnnft.injection.sites import Site, Weights, find_sites
from bnnft.injection.window import Window
from bnnft.tracing.sharding import whole

Gradient = Literal["straight_through", "exact"]


class TurnedBits:
    """The turned state of several weights, from construction until :meth:`restore`.

    :func:`flipped` is this class as a context; use the class where turning and restoring happen in two places.

    Args:
        sites: the weights, from :func:`bnnft.injection.sites.find_sites`.
        flips: for each site's name the flat indices to turn, from :func:`draw_flips`.
        gradient: see :func:`flipped`.
        model: that the sites belong to, for those that are turned in the operand.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        flips: Mapping[str, Flips],
        gradient: Gradient = "straight_through",
        model: nn.Module | None = None,
    ) -> None:
        self._operands: OperandFlips | None = None
        self._weights: list[Window] = []
        self._hooks: list[RemovableHandle] = []
        try:
            places = [
                (site.operand, flips[site.name])
                for site in sites
                if site.in_operand and site.operand is not None and not is_none(flips[site.name])
            ]
            if places and model is not None:
                self._operands = OperandFlips(model, places, exact=gradient == "exact")
                self._operands.__enter__()
            for site in sites:
                if site.in_operand:
                    continue
                indices = flips[site.name]
                assert isinstance(indices, Tensor)  # drawn, since the bits are in the weight
                self._weights.append(window := Window(site, indices, exact=False))
                window.latent = hold(site, window)
                window.flip(check=False)
                if gradient == "exact" and site.weight.requires_grad:
                    hook: RemovableHandle = site.weight.register_hook(_turn_gradient(indices))  # type: ignore[no-untyped-call]
                    self._hooks.append(hook)
        except BaseException:
            self.restore()
            raise

    def clean(self, model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict of the model in which the turned weights are clean copies."""
        turned = {id(weight.site.weight): weight for weight in self._weights}
        cleaned = copy(state)  # shallow; unlike dict() it keeps the modules' versions
        for name, weight in model.named_parameters(remove_duplicate=False):
            if id(weight) in turned and name in cleaned:
                cleaned[name] = cleaned[name].clone()
                window = turned[id(weight)]
                if window.latent is not None:
                    window.latent.clean(cleaned[name])
        return cleaned

    def restore(self) -> None:
        """Put every bit back; more calls do nothing.

        Raises:
            RuntimeError: a weight was overwritten while its bits were turned. All bits that still stood as they
                were turned are back, and the overwritten ones stay as they were written.
        """
        try:
            faults = self._turn_back()
        except BaseException:  # an interrupt: put the rest back before it goes on its way
            self._turn_back()
            raise
        if faults:
            raise RuntimeError(
                "weights were written to while their bits were turned, so they can't be restored exactly "
                f"({'; '.join(faults)}). Update weights outside of the flipped part"
            )

    def _turn_back(self) -> list[str]:
        if self._operands is not None:
            self._operands.__exit__(None, None, None)
            self._operands = None
        while self._hooks:
            self._hooks.pop().remove()
        faults = []
        while self._weights:  # an interrupted call leaves the rest, and what is half done, to the next
            if fault := self._weights[-1].restore(check=False):
                faults.append(fault)
            release(self._weights[-1].site, self._weights[-1])
            self._weights.pop()
        return faults


def _turn_gradient(indices: Tensor) -> Callable[[Tensor], Tensor]:
    def hook(gradient: Tensor) -> Tensor:
        if gradient.requires_grad:  # with create_graph, the turn is part of the graph
            signs = torch.ones_like(gradient)
            flip_signs(signs, indices)
            return gradient * signs
        gradient = gradient.clone()
        flip_signs(gradient, indices)
        return gradient

    return hook


def draw_flips(sites: Sequence[Site], error_model: ErrorModel, key: Key) -> dict[str, Flips]:
    """Return for each site's name the sorted flat indices of the bits that read wrong.

    Where they depend on bits that only the forward makes, what draws them then.
    """
    flips: dict[str, Flips] = {}
    for site in sites:
        own = key.at(site.position, site.name)
        if not reads_bits(error_model):
            flips[site.name] = error_model.flips(site.weight.detach(), own)
        elif site.in_operand:
            flips[site.name] = partial(error_model.flips, key=own)
        else:
            weight = whole(site.weight)
            bits = weight if site.zero is None else torch.where(weight == 0, float(site.zero), weight)
            flips[site.name] = error_model.flips(bits, own)
    return flips


def is_none(flips: Flips) -> bool:
    """Tell whether no bit is turned."""
    return isinstance(flips, Tensor) and flips.numel() == 0


@contextmanager
def flipped(
    model: nn.Module,
    error_model: float | ErrorModel,
    *,
    seed: int = 0,
    draw: int = 0,
    weights: Weights | None = None,
    gradient: Gradient = "straight_through",
    target: Target = "weights",
    activations: Sequence[str] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Run a model with bit errors: turn stored bits on entry, restore them exactly on any exit.

    Args:
        model: any module with binarized weights.
        error_model: a bit error rate in [0, 1] for independent flips, or an error model of :mod:`bnnft.ber`.
        seed: of the random bits, >= 0; the same seed gives the same flips on every device.
        draw: number of the draw (of the fault map) under this seed, >= 0.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.
        gradient: of a flipped weight: ``"straight_through"``, where the flip is the identity in backward
            (Buschjaeger et al. 2020, arXiv 2002.00909), or ``"exact"``, where its gradient changes sign
            (Hirtzlin et al. 2019, arXiv 1904.03652). Backward must run inside the context.
        target: flip ``"weights"``, ``"activations"`` or ``"both"``.
        activations: patterns of the names of binary activations, see
            :class:`bnnft.injection.activation.ActivationFlips`.

    Yields:
        For each weight's name the sorted flat indices of its turned bits.

    Raises:
        TypeError, ValueError: an argument is out of range, or the model has no such weights.
        RuntimeError: on exit, when weights were overwritten inside.

    Example:
        >>> import torch
        >>> from bnnft.nn import BinaryLinear
        >>> model = BinaryLinear(100, 10, bias=False)
        >>> before = model.weight.detach().clone()
        >>> with flipped(model, 0.05, seed=1) as flips:
        ...     changed = (model.weight.detach() != before).sum().item()
        >>> changed == len(flips["weight"]), torch.equal(model.weight, before)
        (True, True)
    """
    checked_choice(gradient, Gradient, "gradient")
    checked_target(target)
    error_model, key = as_error_model(error_model), Key(seed, draw)
    sites = [] if target == "activations" else find_sites(model, weights)
    neurons = [] if target == "weights" else find_activations(model, activations)
    check_layers(error_model, [site.name for site in sites] + neurons)
    flips = draw_flips(sites, error_model, key)
    with ExitStack() as stack:
        stack.enter_context(ActivationFlips(model, neurons, error_model, key, exact=gradient == "exact"))
        stack.callback(TurnedBits(sites, flips, gradient).restore)
        yield {name: indices for name, indices in flips.items() if isinstance(indices, Tensor)}
