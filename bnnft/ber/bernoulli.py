"""Independent trials of one probability, as a pure function of a stream of random words."""

import math

import numpy as np
import torch
from torch import Tensor

from bnnft.ber.random_bits import BLOCK, counters, fractions_of, mixed, random_words, split, where_true

_DENSE = 1 / 8  # from this rate on all trials are looked at: it takes less time than the distances of successes
_DIGITS = 8  # binary digits of a rate that are made of random words
_OWN = range(2**64 - 1 - _DIGITS, 2**64)  # the streams of these and of the rest, apart from all parts of a key


def bernoulli_indices(size: int, rate: float, stream: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the sorted int64 indices of the successes among ``size`` independent trials of probability ``rate``.

    At small rates the work grows with the number of successes and not with ``size``, from 1/8 on with ``size`` and not
    with the rate. The result does not depend on how it is split into blocks.

    Example:
        >>> bernoulli_indices(10, 0.3, stream=5).tolist() == bernoulli_indices(10, 0.3, stream=5).tolist()
        True
        >>> bernoulli_indices(3, 1.0, stream=5)
        tensor([0, 1, 2])
    """
    if rate < _DENSE:
        return _by_gaps(size, rate, stream, device)
    if rate > 1 - _DENSE:
        keep = torch.ones(size, dtype=torch.bool, device=device)
        keep[_by_gaps(size, 1 - rate, stream, device)] = False
        return where_true(keep)
    return where_true(_by_words(size, rate, stream, device))


def _by_words(size: int, rate: float, stream: int, device: torch.device | str) -> Tensor:
    """Return for each of ``size`` independent trials whether it is a success, 64 of them by a word.

    A random bit joined by ``and`` makes p / 2 of a probability p, joined by ``or`` (1 + p) / 2. So each of the first
    binary digits of the rate takes one bit a trial; what is left of the rate is drawn among the failures, by gaps.
    """
    count, digits = -(-size // 64), int(rate * 2**_DIGITS)
    block = BLOCK if torch.device(device).type == "cpu" else max(count, 1)
    streams = [split(stream, number) for number in _OWN]
    successes = torch.zeros(count, dtype=torch.int64, device=device)
    for start in range(0, count, block):
        words = successes[start : start + block]
        for place in range(_DIGITS):  # from the last digit on
            drawn = random_words(streams[place], start, len(words), device)
            (words.bitwise_or_ if digits >> place & 1 else words.bitwise_and_)(drawn)
    found, done = _unpacked(successes)[:size], digits / 2**_DIGITS
    found[_by_gaps(size, (rate - done) / (1 - done), streams[-1], device)] = True
    return found


def _unpacked(words: Tensor) -> Tensor:
    """Return the bits of words, the lowest of each first, as bool."""
    if words.device.type == "cpu":
        lowest_first = words.numpy().astype("<i8", copy=False).view(np.uint8)
        return torch.from_numpy(np.unpackbits(lowest_first, bitorder="little")).view(torch.bool)
    return (words[:, None] >> torch.arange(64, device=words.device)).bitwise_and_(1).to(torch.bool).view(-1)


def _by_gaps(size: int, rate: float, stream: int, device: torch.device | str) -> Tensor:
    """Return the sorted indices of successes by their distances, ``floor(log(u) / log(1 - rate)) + 1``.

    Args:
        size: number of trials.
        rate: probability of success, at most 1/8.
        stream: of random words.
        device: of the result.
    """
    if rate == 0 or size == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    expected = size * rate
    planned = math.ceil(expected + 6 * math.sqrt(expected)) + 16  # enough but for one draw in a billion
    rounds = math.ceil(planned / BLOCK) if torch.device(device).type == "cpu" else 1
    block = math.ceil(planned / rounds)
    steps = counters(block, device)
    words, scratch = torch.empty_like(steps), torch.empty_like(steps)
    logs = torch.empty(block, dtype=torch.float64, device=device)
    indices = torch.empty(rounds * block, dtype=torch.int64, device=device)
    scale, drawn, last = 1 / math.log1p(-rate), 0, -1
    while last < size - 1:
        if drawn == len(indices):
            indices = torch.cat([indices, torch.empty_like(words)])
        gaps = indices[drawn : drawn + block]
        logs.copy_(fractions_of(mixed(words.copy_(steps), stream, drawn, scratch)))
        gaps.copy_(logs.mul_(2.0**-53).log_().mul_(scale).clamp_(max=size)).add_(1)
        gaps[0] += last
        torch.cumsum(gaps, 0, out=gaps)
        drawn, last = drawn + block, int(gaps[-1])
    return indices[: int(torch.searchsorted(indices[:drawn], size))]
