"""Turn sign bits of a weight in place, and put them back bit for bit, whatever happens in between."""

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from bnnft.injection.sites import Site
from bnnft.tracing.sharding import local_part

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
    memory, places = _memory(*local_part(values, indices))
    # Adding the sign bit to an integer turns this bit and no other (the carry falls off): an exclusive or that
    # reads and writes in one pass.
    sign_bit = torch.tensor(torch.iinfo(memory.dtype).min, dtype=memory.dtype, device=memory.device)
    memory.index_add_(0, places, sign_bit.expand(places.shape))


def _signs(values: Tensor, indices: Tensor) -> Tensor:
    memory, places = _memory(values, indices)
    return memory.index_select(0, places) < 0


# the turned states of each weight that are open now: more than one where flips are nested or come from two callbacks
_open: MutableMapping[Tensor, list["TurnedWeight"]] = WeakIdKeyDictionary()


class TurnedWeight:
    """One weight in its turned state, with what is needed to tell whether somebody else wrote to it since."""

    def __init__(self, site: Site, indices: Tensor) -> None:
        self.site, self.drawn = site, indices
        self.weight, indices = local_part(site.weight, indices)
        self.zeros = _Zeros(self.weight, indices, site.zero) if site.zero is not None else None
        self.indices = indices if self.zeros is None else indices[~self.zeros.among]
        self.address = self.weight.data_ptr()
        self.signs = ~_signs(self.weight, self.indices)  # as they are while turned
        self.version: int | None = None  # known once the bits are turned for certain
        _open.setdefault(self.weight, []).append(self)

    def turn(self) -> None:
        """Turn the bits."""
        if self.zeros is not None:
            self.zeros.turn()
        self._write(self.indices)
        self.version = _version(self.weight)

    def turn_back(self) -> str | None:
        """Restore the weight and return what was wrong with it, if anything."""
        weight, indices, interrupted = self.weight, self.indices, self.version is None
        if weight.data_ptr() != self.address:
            self._close()
            return f"{self.site.name}: its memory was replaced"
        if _version(weight) != self.version:  # written by others, or an interrupt left unsaid whether by us
            standing = _signs(weight, indices) == self.signs
            indices = indices if bool(standing.all()) else indices[standing]
        self.version = None
        self._write(indices)
        if self.zeros is not None:
            self.zeros.turn_back()
        self._close()
        overwritten = 0 if interrupted else self.indices.numel() - indices.numel()
        return f"{self.site.name}: {overwritten} turned bits were overwritten" if overwritten else None

    def clean(self, copy: Tensor) -> None:
        """Take the flips out of a copy of the weight."""
        turn_signs(copy, self.drawn if self.zeros is None else self.indices)
        if self.zeros is not None:
            copy.view(-1)[self.zeros.indices] = self.zeros.values

    def _write(self, indices: Tensor) -> None:
        """Turn signs, and let the other turned states of this weight know that it was us."""
        before = _version(self.weight)
        turn_signs(self.weight, indices)
        for other in _open.get(self.weight, ()):
            if other is not self:
                other.signs ^= torch.isin(other.indices, indices, assume_unique=True)
                if other.version == before:
                    other.version = _version(self.weight)

    def _close(self) -> None:
        states = _open.get(self.weight, [])
        if self in states:
            states.remove(self)


class _Zeros:
    """Latent weights of exactly 0 in a layer that reads their sign from a comparison: they have no bit to turn.

    What turns them is a small value of the sign opposite to what the layer makes of a zero: as small as survives next
    to the largest weight, since some layers divide by that and round.
    """

    def __init__(self, weight: Tensor, indices: Tensor, sign: int) -> None:
        flat = weight.detach().reshape(-1)[indices]
        self.among = flat == 0
        self.weight, self.indices, self.values = weight, indices[self.among], flat[self.among]
        self.sign = sign

    def turn(self) -> None:
        if self.indices.numel():
            largest = self.weight.detach().abs().max()
            small = 4 * torch.finfo(largest.dtype).eps * torch.where(largest > 0, largest, 1.0)
            self._put((-self.sign * small).to(self.values.dtype).expand_as(self.values))

    def turn_back(self) -> None:
        self._put(self.values)

    def _put(self, values: Tensor) -> None:
        if self.indices.numel():
            memory, places = _memory(self.weight, self.indices)
            memory.index_copy_(0, places, values.view(memory.dtype))


def _version(weight: Tensor) -> int:
    """Return a number that moves with every write; weights made in inference mode have none."""
    return -1 if weight.is_inference() else weight._version


class LatentFlips:
    """Stand-in."""

    def __init__(self, model, sites, flips, *, exact=False, check=False):  # type: ignore[no-untyped-def]
        self._w = [TurnedWeight(site, flips[site.name]) for site in sites]
        self._exact = exact
        self._h = []
        self._flips = flips

    def __enter__(self):  # type: ignore[no-untyped-def]
        for w in self._w:
            w.turn()
            if self._exact and w.site.weight.requires_grad:

                def hook(g, i=self._flips[w.site.name]):
                    g = g.clone()
                    turn_signs(g, i)
                    return g

                self._h.append(w.site.weight.register_hook(hook))
        return self

    def __exit__(self, *e):  # type: ignore[no-untyped-def]
        for h in self._h:
            h.remove()
        faults = [f for w in self._w if (f := w.turn_back())]
        self._w = []
        if faults:
            raise RuntimeError("; ".join(faults))
