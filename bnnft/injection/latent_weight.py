"""One latent weight whose sign bits are flipped in place, and put back bit for bit, whatever happens in between."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bnnft.injection.signs import flip_signs, memory_of, raw_values
from bnnft.injection.sites import Site
from bnnft.tracing.sharding import local_part


class _State(NamedTuple):
    """Where a weight differs from the clean one; all indices are flat, sorted, and of the part of this process."""

    flipped: Tensor  # indices whose sign bit is flipped
    written: Tensor  # the raw floats there, as they were written
    zeros: Tensor  # indices at which a small value stands for a latent of exactly 0
    values: Tensor  # the raw zeros that were there


class _Step(NamedTuple):
    """A change of state that has begun; an interrupt may leave it anywhere."""

    to: _State
    changed: Tensor  # indices whose sign bit it flips, all at once
    before: Tensor  # the raw floats there before


class LatentWeight:
    """A latent weight as all contexts see it that flip bits of it at the same time.

    The bits that are wrong at a time are those that an odd number of open windows flip, so that windows may close in
    any order. Latents of exactly 0, in layers that make a sign of them by a comparison, have no bit to flip: a small
    value of the opposite sign stands for them, as small as survives next to the largest weight.

    Args:
        site: the weight, with its name and what its layer makes of a zero.
    """

    def __init__(self, site: Site) -> None:
        self.name, self.weight, self.zero = site.name, site.weight, site.zero
        self.users: set[object] = set()
        self.windows: dict[object, Tensor] = {}  # that are open, with the indices that each flips
        none = torch.empty(0, dtype=torch.int64, device=site.weight.device)
        raw = raw_values(local_part(site.weight, none)[0], none)
        self._clean = self._state = _State(none, raw, none, raw)
        self._step: _Step | None = None
        self._address = 0
        self._version: int | None = None

    @property
    def flipped(self) -> bool:
        """Whether the weight may differ from the clean one now."""
        return bool(self.windows) or self._step is not None or self._state is not self._clean

    @property
    def part(self) -> Tensor:
        """What this process holds of the weight now."""
        return local_part(self.weight, self._clean.zeros)[0]

    def flip(self, window: object, indices: Tensor, check: bool = False) -> str | None:
        """Open a window: flip bits; arguments and result as of :meth:`restore`.

        Args:
            window: whoever restores them.
            indices: flat, sorted, distinct, of the part of this process.
            check: see :meth:`restore`.
        """
        self.windows[window] = indices
        return self._change(check)

    def restore(self, window: object, check: bool = False) -> str | None:
        """Close a window: put its bits back, and return what others did to the weight that can't be put right.

        Values that others wrote stay, with the flipped signs put back: a layer may clamp its latent in each forward.

        Args:
            window: nothing happens if it is not open.
            check: compare all flipped bits with what was written, also where no write was counted.
        """
        fault = self._change(check, closing=window) if window in self.windows else None
        self.windows.pop(window, None)  # after the change: an interrupted one is done again
        return fault

    @torch.no_grad()
    def clean(self, values: Tensor) -> None:
        """Take all flips that are open out of a copy of the weight, also in the middle of a change."""
        values = local_part(values, self._clean.zeros)[0]
        state, _ = _standing(values, self._actual(values), self.zero)
        _put(values, state.zeros, state.values)
        flip_signs(values, state.flipped)

    def clean_copy(self) -> Tensor:
        """Return a clean copy of the weight, detached."""
        values = self.weight.detach().clone()
        self.clean(values)
        return values

    def _change(self, check: bool, closing: object = None) -> str | None:
        """Bring the weight from what is flipped now to what the windows say."""
        part = self.part
        self._state, self._step = self._actual(part), None
        fault = self._verify(part, check)
        old = self._state
        wanted = _odd([indices for window, indices in self.windows.items() if window is not closing] or [old.zeros[:0]])
        self._step = self._planned(part, old, wanted)
        new = self._step.to  # from here on an interrupt may come at any line
        if old.zeros.numel():
            back = torch.isin(old.zeros, new.zeros, invert=True)
            _put(part, old.zeros[back], old.values[back])
        if self.zero is not None and new.zeros.numel():
            small = _stand_in(part, self.zero).view(new.values.dtype)
            _put(part, new.zeros, small.expand_as(new.values))
        flip_signs(part, self._step.changed)
        self._state, self._step, self._version = new, None, _version(part)
        return fault

    def _planned(self, part: Tensor, old: _State, wanted: Tensor) -> _Step:
        """Return the change that leaves exactly the wanted indices wrong, before anything is written."""
        if not wanted.numel():
            return _Step(self._clean, old.flipped, old.written)
        zeros, values = wanted[:0], old.values[:0]
        if self.zero is not None:
            raw = raw_values(part, wanted)
            among = (raw.view(part.dtype) == 0) | torch.isin(wanted, old.zeros)
            zeros, values = wanted[among], raw[among]
            values[torch.isin(zeros, old.zeros)] = old.values[torch.isin(old.zeros, zeros)]
            wanted = wanted[~among]
        changed = _odd([old.flipped, wanted])
        before = raw_values(part, changed)
        sign_bit = torch.iinfo(before.dtype).min
        if not old.flipped.numel():
            written = before ^ sign_bit
        else:  # of what is already flipped by other windows, only what they share changes
            written = raw_values(part, wanted)
            written = torch.where(torch.isin(wanted, changed), written ^ sign_bit, written)
        return _Step(_State(wanted, written, zeros, values), changed, before)

    def _actual(self, values: Tensor) -> _State:
        """Return the state that the weight, or a copy of it, is in: a change that was cut short may be done or not."""
        old, step = self._state, self._step
        if step is None:
            return old
        undone = (raw_values(values, step.changed) ^ step.before) >= 0
        flipped, written, *_ = old if bool(undone.any()) else step.to
        more = torch.isin(old.zeros, step.to.zeros, invert=True)
        zeros, order = torch.cat([step.to.zeros, old.zeros[more]]).sort()
        return _State(flipped, written, zeros, torch.cat([step.to.values, old.values[more]])[order])

    def _verify(self, part: Tensor, check: bool) -> str | None:
        """Leave out of the state what others have overwritten, and return what can't be put right."""
        state = self._state
        if not state.flipped.numel() + state.zeros.numel():
            self._address = part.data_ptr()
            return None
        if part.data_ptr() != self._address:
            self._state = self._clean
            self.windows.clear()
            return f"{self.name}: its memory was replaced"
        if not check and self._version is not None and self._version == _version(part):
            return None
        now = raw_values(part, state.flipped)
        if not state.zeros.numel() and torch.equal(now, state.written):
            return None
        self._state, lost = _standing(part, state, self.zero)
        if lost.numel():
            kept = {window: indices[torch.isin(indices, lost, invert=True)] for window, indices in self.windows.items()}
            self.windows.update(kept)
            return f"{self.name}: {lost.numel()} flipped bits were overwritten"
        largest = torch.iinfo(state.written.dtype).max  # all bits of a float but its sign
        grown = (now & largest) - (state.written & largest)
        if bool((grown > 0).any()) and bool((grown < 0).any()):
            return f"{self.name}: flipped bits were updated"
        return None


def _standing(values: Tensor, state: _State, zero: int | None) -> tuple[_State, Tensor]:
    """Return the part of a state that still stands in the weight, or in a copy of it, and the other indices."""
    stands = (raw_values(values, state.flipped) ^ state.written) >= 0
    at_zeros = raw_values(values, state.zeros).view(values.dtype)
    small = (at_zeros == 0) | (at_zeros.signbit() == (zero == 1))
    if bool(stands.all()) and bool(small.all()):
        return state, state.flipped[:0]
    lost = torch.cat([state.flipped[~stands], state.zeros[~small]])
    return _State(state.flipped[stands], state.written[stands], state.zeros[small], state.values[small]), lost


def _stand_in(part: Tensor, zero: int) -> Tensor:
    """Return the value that reads as the opposite of a zero."""
    largest = part.detach().abs().max()
    largest = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return (-zero * 4 * torch.finfo(part.dtype).eps * largest).to(part.dtype)


def _odd(indices: Sequence[Tensor]) -> Tensor:
    """Return the indices that an odd number of tensors of distinct ones hold, sorted."""
    some = [tensor for tensor in indices if tensor.numel()]
    if len(some) < 2:
        return some[0] if some else indices[0]
    values, counts = torch.unique(torch.cat(some), return_counts=True)
    odd: Tensor = values[counts % 2 == 1]
    return odd


def _put(part: Tensor, indices: Tensor, values: Tensor) -> None:
    if indices.numel():
        memory, places = memory_of(part, indices)
        memory.index_copy_(0, places, values)


def _version(weight: Tensor) -> int | None:
    """Return a number that moves with every write that autograd sees; weights made in inference mode have none."""
    return None if weight.is_inference() else weight._version
