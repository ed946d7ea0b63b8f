"""Run a module without a lasting effect: what it keeps is put back, and so are the streams of random numbers."""

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bnnft.tracing.restores import Restore, restore_dict, restore_of, restore_streams
from bnnft.tracing.sharding import exchanges_parameters

_MOST_ELEMENTS = 10_000  # of a container that are looked into; of larger ones, as data sets are, the elements stay
_DEEPEST = 6  # containers within containers
# of hooks, by their numbers
_OF_HOOKS = {"_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"}
_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size)
_PLAIN += (FunctionType, BuiltinFunctionType, MethodType, ModuleType, type)  # type: ignore[assignment]


@contextmanager
def unchanged(module: nn.Module, skip: Iterable[nn.Module] = (), parameters: bool = True) -> Iterator[list[str]]:
    """Put back whatever runs inside of the context changes in a module, and the streams of random numbers.

    That is parameters, buffers, and what the module and its parts keep as attributes: numbers, tensors, arrays, lists,
    dicts, sets, queues, generators of random numbers, metrics, optimizers, and objects of classes of one's own that
    hold such things. Gradients are left alone, and so are objects of other packages, loggers, say, and parameters that
    FSDP or DeepSpeed exchange while a model runs.

    Args:
        module: that is to run.
        skip: parts of it whose buffers are to change.
        parameters: put their values back too, which takes a copy of them.

    Yields:
        A list that is filled at the end with the names of what has moved and can't be put back: iterators and files.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> layer.losses = []
        >>> with unchanged(layer):
        ...     layer.losses.append(layer(torch.randn(8, 2)).sum())
        >>> layer.losses, layer.num_batches_tracked
        ([], tensor(0))
    """
    moved: list[str] = []
    kept = _Kept()
    if exchanges_parameters(module):  # what is a parameter now may have no memory later
        kept.leave([vars(part)["_parameters"] for part in module.modules()])
        kept.leave([*module.parameters()])
    if not parameters:
        kept.leave([*module.parameters()])
    for part in skip:
        kept.leave([vars(part)["_buffers"], *part.buffers(recurse=False)])
    kept.look(module, "", 0)
    streams = restore_streams()
    try:
        yield moved
    finally:
        streams()
        moved += kept.restore()


class _Kept:
    """Copies of what can be reached from an object."""

    def __init__(self) -> None:
        self._objects: list[Any] = []  # kept alive, so that no later object has the identity of one of them
        self._known: set[int] = set()
        self._restores: list[tuple[str, Restore]] = []

    def leave(self, things: list[Any]) -> None:
        """Do not look into some things."""
        self._objects += things
        self._known.update(map(id, things))

    def restore(self) -> list[str]:
        """Put everything back; return the names of what can't be."""
        return [name for name, restore in self._restores if not restore()]

    def look(self, thing: Any, name: str, depth: int) -> None:
        """Copy one thing, and what it holds."""
        if isinstance(thing, _PLAIN) or id(thing) in self._known or depth > _DEEPEST:
            return
        self.leave([thing])
        restore = restore_of(thing)
        if restore is not None:
            self._restores.append((name, restore))
        attributes = _attributes(thing)
        if attributes is not None:
            self._restores.append((name, restore_dict(attributes)))
        deeper = 0 if isinstance(thing, nn.Module) else depth + 1
        for key, part in (attributes or {}).items():
            if key in _OF_HOOKS:
                continue
            hidden = key in ("_parameters", "_buffers", "_modules")
            self.look(part, name if hidden else f"{name}.{key}".strip("."), deeper)
        for key, part in _elements(thing):
            self.look(part, f"{name}.{key}".strip("."), deeper)


def _attributes(thing: Any) -> dict[str, Any] | None:
    """Return the dict of an object's attributes, the object's own and no copy, unless another package is in charge."""
    attributes = getattr(thing, "__dict__", None)
    known = isinstance(thing, nn.Module | Tensor | torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler)
    file = getattr(sys.modules.get(type(thing).__module__), "__file__", None) or ""
    return attributes if isinstance(attributes, dict) and (known or "site-packages" not in file) else None


def _elements(thing: Any) -> list[tuple[Any, Any]]:
    """Return the elements of a container, unless there are very many."""
    if isinstance(thing, torch.jit.ScriptModule):  # keeps them elsewhere
        return [*thing.named_parameters(), *thing.named_buffers()]
    if isinstance(thing, dict) and len(thing) <= _MOST_ELEMENTS:
        return list(thing.items())
    if isinstance(thing, list | tuple | deque | set | frozenset) and len(thing) <= _MOST_ELEMENTS:
        return list(enumerate(thing))
    return []
