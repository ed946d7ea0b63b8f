"""Turn stored bits of a model's weights, and put them back bit for bit.

The stored bit is the sign bit of the latent weight. Turning it is one exclusive or with the sign bit, in place,
at the drawn positions only; turning it again restores every float, zeros and NaN included.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from bnnft.ber import ErrorModel, Key, as_error_model
from bnnft.sites import Site, find_sites

Gradient = Literal["straight_through", "exact"]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _memory(weight: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight's memory as one row of integers, and where in it the flat indices lie."""
    memory, places = weight.detach(), indices  # not .data: autograd must see that the weight was written
    if memory.is_contiguous():
        memory = memory.view(-1)
    else:
        places, rest, extent = torch.zeros_like(indices), indices, 1
        for size, stride in zip(reversed(memory.shape), reversed(memory.stride()), strict=True):
            places += rest.remainder(size) * stride
            rest, extent = rest.div(size, rounding_mode="floor"), extent + (size - 1) * stride
        memory = memory.as_strided((extent,), (1,))
    return memory.view(_INTEGERS[memory.element_size()]), places


def turn_signs(values: Tensor, indices: Tensor) -> None:
    """Turn the sign bits of a float tensor in place, at distinct flat indices; twice is the identity.

    Works on every float type and memory layout, without a copy of the tensor.

    Example:
        >>> import torch
        >>> values = torch.tensor([1.0, -0.0, 3.0])
        >>> turn_signs(values, torch.tensor([0, 1]))
        >>> values
        tensor([-1., 0., 3.])
    """
    memory, places = _memory(values, indices)
    # Adding the sign bit to an integer turns this bit and no other (the carry falls off): an exclusive or that
    # reads and writes in one pass.
    sign_bit = torch.tensor(torch.iinfo(memory.dtype).min, dtype=memory.dtype, device=memory.device)
    memory.index_add_(0, places, sign_bit.expand(places.shape))


def _signs(values: Tensor, indices: Tensor) -> Tensor:
    memory, places = _memory(values, indices)
    return memory.index_select(0, places) < 0


# the turned states of each weight that are open now: more than one where flips are nested or come from two callbacks
_open: MutableMapping[Tensor, list["_TurnedWeight"]] = WeakIdKeyDictionary()


class _TurnedWeight:
    """One weight in its turned state, with what is needed to tell whether somebody else wrote to it since."""

    def __init__(self, site: Site, indices: Tensor) -> None:
        self.site, self.indices = site, indices
        self.address = site.weight.data_ptr()
        self.signs = ~_signs(site.weight, indices)  # as they are while turned
        self.version: int | None = None  # known once the bits are turned for certain
        _open.setdefault(site.weight, []).append(self)

    def turn(self) -> None:
        self._write(self.indices)
        self.version = _version(self.site.weight)

    def turn_back(self) -> str | None:
        """Restore the weight and return what was wrong with it, if anything."""
        weight, indices, interrupted = self.site.weight, self.indices, self.version is None
        if weight.data_ptr() != self.address:
            self._close()
            return f"{self.site.name}: its memory was replaced"
        if _version(weight) != self.version:  # written by others, or an interrupt left unsaid whether by us
            standing = _signs(weight, indices) == self.signs
            indices = indices if bool(standing.all()) else indices[standing]
        self.version = None
        self._write(indices)
        self._close()
        overwritten = 0 if interrupted else self.indices.numel() - indices.numel()
        return f"{self.site.name}: {overwritten} turned bits were overwritten" if overwritten else None

    def _write(self, indices: Tensor) -> None:
        """Turn signs, and let the other turned states of this weight know that it was us."""
        before = _version(self.site.weight)
        turn_signs(self.site.weight, indices)
        for other in _open.get(self.site.weight, ()):
            if other is not self:
                other.signs ^= torch.isin(other.indices, indices, assume_unique=True)
                if other.version == before:
                    other.version = _version(self.site.weight)

    def _close(self) -> None:
        states = _open.get(self.site.weight, [])
        if self in states:
            states.remove(self)


def _version(weight: Tensor) -> int:
    """Return a number that moves with every write; weights made in inference mode have none."""
    return -1 if weight.is_inference() else weight._version


class TurnedBits:
    """The turned state of several weights, from construction until :meth:`restore`.

    :func:`flipped` is this class as a context; use the class where turning and restoring happen in two places.

    Args:
        sites: the weights, from :func:`bnnft.sites.find_sites`.
        flips: for each site's name the flat indices to turn, from :func:`draw_flips`.
        gradient: see :func:`flipped`.
    """

    def __init__(
        self, sites: Sequence[Site], flips: Mapping[str, Tensor], gradient: Gradient = "straight_through"
    ) -> None:
        self._weights: list[_TurnedWeight] = []
        self._hooks: list[RemovableHandle] = []
        try:
            for site in sites:
                self._weights.append(_TurnedWeight(site, flips[site.name]))
                self._weights[-1].turn()
                if gradient == "exact" and site.weight.requires_grad:
                    hook: RemovableHandle = site.weight.register_hook(_turn_gradient(flips[site.name]))  # type: ignore[no-untyped-call]
                    self._hooks.append(hook)
        except BaseException:
            self.restore()
            raise

    def clean(self, model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict of the model in which the turned weights are clean copies."""
        turned = {id(weight.site.weight): weight.indices for weight in self._weights}
        cleaned = copy(state)  # shallow; unlike dict() it keeps the modules' versions
        for name, weight in model.named_parameters(remove_duplicate=False):
            if id(weight) in turned and name in cleaned:
                cleaned[name] = cleaned[name].clone()
                turn_signs(cleaned[name], turned[id(weight)])
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
        while self._hooks:
            self._hooks.pop().remove()
        faults = []
        while self._weights:  # an interrupted call leaves the rest, and what is half done, to the next
            if fault := self._weights[-1].turn_back():
                faults.append(fault)
            self._weights.pop()
        return faults


def _turn_gradient(indices: Tensor) -> Callable[[Tensor], Tensor]:
    def hook(gradient: Tensor) -> Tensor:
        if gradient.requires_grad:  # with create_graph, the turn is part of the graph
            signs = torch.ones_like(gradient)
            turn_signs(signs, indices)
            return gradient * signs
        gradient = gradient.clone()
        turn_signs(gradient, indices)
        return gradient

    return hook


def draw_flips(sites: Sequence[Site], error_model: ErrorModel, key: Key) -> dict[str, Tensor]:
    """Return for each site's name the sorted flat indices of the bits that read wrong."""
    return {site.name: error_model.flips(site.weight.detach(), key.at(site.position, site.name)) for site in sites}


def checked_gradient(gradient: str) -> None:
    """Raise ValueError unless the argument names a gradient through the flip."""
    if gradient not in get_args(Gradient):
        raise ValueError(f"gradient must be one of {', '.join(get_args(Gradient))}, got {gradient!r}")


@contextmanager
def flipped(
    model: nn.Module,
    error_model: float | ErrorModel,
    *,
    seed: int = 0,
    draw: int = 0,
    weights: Sequence[str] | None = None,
    gradient: Gradient = "straight_through",
) -> Iterator[dict[str, Tensor]]:
    """Run a model with bit errors: turn stored bits on entry, restore them exactly on any exit.

    Args:
        model: any module with binarized weights.
        error_model: a bit error rate in [0, 1] for independent flips, or an error model of :mod:`bnnft.ber`.
        seed: of the random bits, >= 0; the same seed gives the same flips on every device.
        draw: number of the draw (of the fault map) under this seed, >= 0.
        weights: patterns that select weights, see :func:`bnnft.binarized_weights`.
        gradient: of a flipped weight: ``"straight_through"``, where the flip is the identity in backward
            (Buschjaeger et al. 2020, arXiv 2002.00909), or ``"exact"``, where its gradient changes sign
            (Hirtzlin et al. 2019, arXiv 1904.03652). Backward must run inside the context.

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
    checked_gradient(gradient)
    sites = find_sites(model, weights)
    flips = draw_flips(sites, as_error_model(error_model), Key(seed, draw))
    turned = TurnedBits(sites, flips, gradient)
    try:
        yield flips
    finally:
        turned.restore()
