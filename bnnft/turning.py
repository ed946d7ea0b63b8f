"""Turn sign bits of a weight in place, and put them back bit for bit, whatever happens in between."""

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from bnnft.sites import Site

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
_open: MutableMapping[Tensor, list["TurnedWeight"]] = WeakIdKeyDictionary()


class TurnedWeight:
    """One weight in its turned state, with what is needed to tell whether somebody else wrote to it since."""

    def __init__(self, site: Site, indices: Tensor) -> None:
        self.site = site
        self.zeros = _Zeros(site, indices) if site.zero is not None else None
        self.indices = indices if self.zeros is None else indices[~self.zeros.among]
        self.address = site.weight.data_ptr()
        self.signs = ~_signs(site.weight, self.indices)  # as they are while turned
        self.version: int | None = None  # known once the bits are turned for certain
        _open.setdefault(site.weight, []).append(self)

    def turn(self) -> None:
        """Turn the bits."""
        if self.zeros is not None:
            self.zeros.turn()
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
        if self.zeros is not None:
            self.zeros.turn_back()
        self._close()
        overwritten = 0 if interrupted else self.indices.numel() - indices.numel()
        return f"{self.site.name}: {overwritten} turned bits were overwritten" if overwritten else None

    def clean(self, copy: Tensor) -> None:
        """Take the flips out of a copy of the weight."""
        turn_signs(copy, self.indices)
        if self.zeros is not None:
            copy.view(-1)[self.zeros.indices] = self.zeros.values

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


class _Zeros:
    """Latent weights of exactly 0 in a layer that reads their sign from a comparison: they have no bit to turn.

    What turns them is a tiny value of the sign opposite to what the layer makes of a zero.
    """

    def __init__(self, site: Site, indices: Tensor) -> None:
        flat = site.weight.detach().reshape(-1)[indices]
        self.among = flat == 0
        self.weight, self.indices, self.values = site.weight, indices[self.among], flat[self.among]
        self.tiny = -(site.zero or 0) * torch.finfo(flat.dtype).tiny

    def turn(self) -> None:
        self._put(torch.full_like(self.values, self.tiny))

    def turn_back(self) -> None:
        self._put(self.values)

    def _put(self, values: Tensor) -> None:
        if self.indices.numel():
            memory, places = _memory(self.weight, self.indices)
            memory.index_copy_(0, places, values.view(memory.dtype))


def _version(weight: Tensor) -> int:
    """Return a number that moves with every write; weights made in inference mode have none."""
    return -1 if weight.is_inference() else weight._version
