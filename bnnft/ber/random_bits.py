"""Random bits as a pure function of a key and a counter: no state, equal on every device.

The generator is SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014):
word ``i`` of a stream is ``mix(stream + (i + 1) * gamma)``, so that any part of a stream can be computed at once
by tensor operations. torch's own generators are never touched.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None))  # shifts and multipliers of the mix
BLOCK = 1 << 15  # words computed at a time on a CPU: the work stays in its cache


def _signed(word: int) -> int:
    """Return the int64 that has the same bits as the 64-bit word: torch has no arithmetic on uint64."""
    return word - (1 << 64) if word >> 63 else word


def _mix(word: int) -> int:
    for shift, multiplier in _ROUNDS:
        word ^= word >> shift
        word = (word * (multiplier or 1)) & _MASK
    return word


@dataclass(frozen=True)
class Key:
    """Names one stream of random bits.

    Attributes:
        seed: the user's seed, >= 0.
        draw: which draw of this seed: the training step or the number of the fault map, >= 0.
        position: the weight's position among the parameters of its model, >= 0.
        purpose: at most eight ASCII letters that keep streams apart which share all numbers, as training and
            evaluation do.
        name: the weight's qualified name, for error models that differ by layer; no part of the stream.
        parts: which part of the draw, where one has several; see :meth:`part`.

    Example:
        >>> Key(seed=0).at(position=3, name="fc1.weight")
        Key(seed=0, draw=0, position=3, purpose='', name='fc1.weight', parts=())
        >>> Key(seed=0).stream() == Key(seed=1).stream()
        False
    """

    seed: int = 0
    draw: int = 0
    position: int = 0
    purpose: str = ""
    name: str = ""
    parts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in ("seed", "draw", "position"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{field} must be an integer >= 0, got {value!r}")
            if value > _MASK:
                raise ValueError(f"{field} must be below 2^64, got {value!r}")
        if len(self.purpose.encode()) > 8:
            raise ValueError(f"purpose must have at most 8 ASCII letters, got {self.purpose!r}")

    def at(self, position: int, name: str = "") -> "Key":
        """Return the key of the weight at this position of the model."""
        return replace(self, position=position, name=name)

    def part(self, number: int) -> "Key":
        """Return the key of one of several parts of this draw, each with a stream of its own."""
        return replace(self, parts=(*self.parts, number))

    def of_chip(self, chip: int) -> "Key":
        """Return the key of what is fixed in a chip: the same in every draw and part of it, and under every seed."""
        return Key(seed=chip, position=self.position, purpose="chip", name=self.name)

    def stream(self) -> int:
        """Return the 64-bit start of the stream that belongs to this key."""
        word = 0
        for part in (int.from_bytes(self.purpose.encode()), self.seed, self.draw, self.position, *self.parts):
            word = split(word, part)
        return word


def split(stream: int, number: int) -> int:
    """Return the 64-bit start of one of the streams that split off another one."""
    return _mix((stream + _GAMMA + number) & _MASK)


def random_words(stream: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Return words ``start`` to ``start + count - 1`` of a stream as int64 (64 random bits each).

    Example:
        >>> [int(word) & (2**64 - 1) for word in random_words(1234567, 0, 2)]  # as published for this seed
        [6457827717110365317, 3203168211198807973]
    """
    words = counters(count, device)
    return mixed(words, stream, start, torch.empty_like(words))


def counters(count: int, device: torch.device | str) -> Tensor:
    """Return ``gamma, 2 gamma, ...``, of which :func:`mixed` makes words."""
    return torch.arange(1, count + 1, dtype=torch.int64, device=device).mul_(_signed(_GAMMA))


def mixed(counters: Tensor, stream: int, start: int, scratch: Tensor) -> Tensor:
    """Make ``gamma, 2 gamma, ...`` the words of a stream from ``start`` on, in place."""
    words = counters.add_(_signed((stream + start * _GAMMA) & _MASK))
    if words.device.type == "cpu":  # numpy has unsigned words: no masks, and faster products
        unsigned, shifted = words.numpy().view(np.uint64), scratch.numpy().view(np.uint64)
        for shift, multiplier in _ROUNDS:
            np.bitwise_xor(unsigned, np.right_shift(unsigned, shift, out=shifted), out=unsigned)
            if multiplier is not None:
                np.multiply(unsigned, multiplier, out=unsigned)
        return words
    for shift, multiplier in _ROUNDS:
        # >> on int64 repeats the sign; the mask makes it the logical shift that the generator wants
        torch.bitwise_right_shift(words, shift, out=scratch).bitwise_and_((1 << (64 - shift)) - 1)
        words.bitwise_xor_(scratch)
        if multiplier is not None:
            words.mul_(_signed(multiplier))
    return words


def uniforms(stream: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Return float64 numbers uniform on the multiples of 2^-53 in (0, 1].

    Example:
        >>> numbers = uniforms(7, 0, 1000)
        >>> bool(numbers.min() > 0), bool(numbers.max() <= 1)
        (True, True)
    """
    return fractions_of(random_words(stream, start, count, device)).to(torch.float64).mul_(2.0**-53)


def where_true(mask: Tensor) -> Tensor:
    """Return the indices at which a mask of one dimension is true; on a CPU by numpy, in a tenth of torch's time.

    Example:
        >>> import torch
        >>> where_true(torch.tensor([False, True, True]))
        tensor([1, 2])
    """
    if mask.device.type == "cpu":
        return torch.from_numpy(mask.numpy().nonzero()[0])
    return mask.nonzero().squeeze(1)


def below_at(rate: float, stream: int, places: Tensor) -> Tensor:
    """Return for numbers of :func:`uniforms` at some places (int64, any order) whether they are at most ``rate``.

    Example:
        >>> import torch
        >>> below_at(0.5, 7, torch.tensor([5, 2, 0])), uniforms(7, 0, 6)[[5, 2, 0]] <= 0.5
        (tensor([ True, False,  True]), tensor([ True, False,  True]))
    """
    block = BLOCK if places.device.type == "cpu" else max(len(places), 1)
    scratch = torch.empty(min(block, len(places)), dtype=torch.int64, device=places.device)
    below = torch.empty(len(places), dtype=torch.bool, device=places.device)
    for start in range(0, len(places), block):
        words = (places[start : start + block] + 1).mul_(_signed(_GAMMA))
        fractions = fractions_of(mixed(words, stream, 0, scratch[: len(words)]))
        torch.le(fractions, int(rate * 2.0**53), out=below[start : start + block])
    return below


def fractions_of(words: Tensor) -> Tensor:
    """Make words their upper 53 bits plus 1, in place: multiples of 2^-53 without rounding."""
    if words.device.type == "cpu":
        unsigned = words.numpy().view(np.uint64)
        np.right_shift(unsigned, 11, out=unsigned)
        return words.add_(1)
    return words.bitwise_right_shift_(11).bitwise_and_((1 << 53) - 1).add_(1)


def places_below(rate: float | Tensor, size: int, stream: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the sorted int64 indices of the numbers of :func:`uniforms` that are at most ``rate``.

    Unlike those of :func:`bernoulli_indices` they nest: a higher rate only adds some. The work grows with ``size``.

    Args:
        rate: one for all, or a float64 tensor with one for each.
        size: how many numbers of the stream to look at.
        stream: of the numbers.
        device: of the result.

    Example:
        >>> places_below(0.5, 6, stream=7), places_below(1.0, 3, stream=7)
        (tensor([0, 1, 4, 5]), tensor([0, 1, 2]))
    """
    block = BLOCK if torch.device(device).type == "cpu" else max(size, 1)
    steps = counters(min(block, size), device)
    words, scratch = torch.empty_like(steps), torch.empty_like(steps)
    found = []
    for start in range(0, size, block):
        count = min(block, size - start)
        part = fractions_of(mixed(words[:count].copy_(steps[:count]), stream, start, scratch[:count]))
        # torch compares integers with a Python float in float32; the fractions need all of their 53 bits
        limit = rate[start : start + count] * 2.0**53 if isinstance(rate, Tensor) else int(rate * 2.0**53)
        found.append(where_true(part <= limit).add_(start))
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=device)
