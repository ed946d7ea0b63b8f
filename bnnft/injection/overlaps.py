"""Flips of one model that overlap: contexts are entered and left together, and what others flip proves nothing."""

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from bnnft.injection.finder import Finder

# by whose flips a model runs now
_OPEN: MutableMapping[nn.Module, list[Finder]] = WeakKeyDictionary()


def entered(finder: Finder, contexts: Sequence[AbstractContextManager[Any]]) -> Iterator[None]:
    """Yield once inside of contexts, and leave all of them even where an interrupt comes while they are left.

    A generator for ``yield from``: a context manager of its own would be one more place for interrupts.
    """
    try:
        _OPEN.setdefault(finder.model, []).append(finder)
        try:
            for context in contexts:
                context.__enter__()
            yield
        finally:
            _leave(finder, contexts)
    except BaseException:
        _leave(finder, contexts)  # again: an interrupt may have come in between
        raise


def overlaps(finder: Finder) -> bool:
    """Return whether others flip bits of the model now; what they flip is no fault of theirs or ours."""
    others = _OPEN.get(finder.model, [])
    for other in others:
        other.proof = None
    return bool(others)


def _leave(finder: Finder, contexts: Sequence[AbstractContextManager[Any]]) -> None:
    """Leave contexts, entered or not; each leaves nothing behind when it is asked again."""
    _OPEN[finder.model] = [other for other in _OPEN.get(finder.model, []) if other is not finder]
    with ExitStack() as stack:
        for context in contexts:
            stack.push(context)
