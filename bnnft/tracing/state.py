"""Run a module without a lasting effect: what it keeps is put back, and so are the streams of random numbers."""

import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnnft.tracing.sharding import exchanges_parameters

_MOST_ELEMENTS = 10_000  # of a container that are looked into; of larger ones, as data sets are, the elements stay
_DEEPEST = 6  # containers within containers
# of hooks, by their numbers
_OF_HOOKS = {"_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"}
_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size)
_PLAIN += (FunctionType, BuiltinFunctionType, MethodType, ModuleType, type)  # type: ignore[assignment]

# puts one thing back; returns whether it could, which it can too if nothing has moved
_Restore = Callable[[], bool]


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
    streams = _streams()
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
        self._restores: list[tuple[str, _Restore]] = []

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
        restore = _restore_of(thing)
        if restore is not None:
            self._restores.append((name, restore))
        attributes = _attributes(thing)
        if attributes is not None:
            self._restores.append((name, _restore_dict(attributes)))
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


def _restore_of(thing: Any) -> _Restore | None:
    """Return what puts an object's own contents back."""
    if isinstance(thing, Tensor):
        return _restore_tensor(thing)
    if isinstance(thing, dict):
        return _restore_dict(thing)
    if isinstance(thing, list | deque | bytearray):
        return _restore_sequence(thing)
    if isinstance(thing, set):
        return _restore_set(thing)
    if isinstance(thing, np.ndarray) and thing.flags.writeable:
        return _restore_by(thing.copy(), lambda values: thing.__setitem__(..., values))
    if isinstance(thing, torch.Generator):
        return _restore_by(thing.get_state().clone(), thing.set_state)
    if isinstance(thing, random.Random):
        return _restore_by(thing.getstate(), thing.setstate)
    if isinstance(thing, np.random.RandomState):
        return _restore_by(thing.get_state(), thing.set_state)
    if isinstance(thing, np.random.Generator):
        return _restore_by(thing.bit_generator.state, lambda state: setattr(thing.bit_generator, "state", state))
    if hasattr(thing, "__next__") or hasattr(thing, "tell"):
        before = _position(thing)
        return lambda: _position(thing) == before
    return None


def _restore_tensor(tensor: Tensor) -> _Restore | None:
    if nn.parameter.is_lazy(tensor) or tensor.layout != torch.strided or tensor.device.type == "meta":
        return None
    learned, leaf = tensor.requires_grad, tensor.is_leaf
    memory = tensor.data  # what it holds now, whatever it is made to hold later
    local = getattr(memory, "_local_tensor", memory)  # of a distributed tensor this process's part
    values = local.clone()

    def restore() -> bool:
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            if tensor.shape != memory.shape or tensor.data_ptr() != memory.data_ptr():
                tensor.data = memory
            local.copy_(values)  # which moves no version: a graph that was there before can still be run backward
            if leaf and tensor.is_leaf and tensor.requires_grad != learned:
                tensor.requires_grad_(learned)
        return True

    return restore


def _is_left_alone(value: Any) -> bool:
    """Return whether a value says that it is left as it is: hooks that come and go with contexts, say."""
    first = value[0] if type(value) is tuple and value else value
    return "left_alone" in vars(type(first))


def _restore_dict(thing: dict[Any, Any]) -> _Restore:
    before = [(key, value) for key, value in thing.items() if not _is_left_alone(value)]

    def restore() -> bool:
        keys = {key for key, _ in before}
        now = [key for key, value in thing.items() if not _is_left_alone(value)]
        for key in [key for key in now if key not in keys]:
            del thing[key]
        for key, value in before:
            if key not in thing or thing[key] is not value:
                thing[key] = value
        kept = [id(key) for key, value in thing.items() if not _is_left_alone(value)]
        if kept != [id(key) for key, _ in before]:  # the order of what is used as a queue
            for key, value in before:
                del thing[key]
                thing[key] = value
        return True

    return restore


def _restore_sequence(thing: Any) -> _Restore:
    before = list(thing)

    def restore() -> bool:
        if len(thing) != len(before) or any(a is not b for a, b in zip(thing, before, strict=True)):
            thing.clear()
            thing.extend(before)
        return True

    return restore


def _restore_set(thing: set[Any]) -> _Restore:
    before = set(thing)

    def restore() -> bool:
        thing.intersection_update(before)
        thing.update(before)
        return True

    return restore


def _restore_by(state: Any, put: Callable[[Any], Any]) -> _Restore:
    def restore() -> bool:
        put(state)
        return True

    return restore


def _position(thing: Any) -> Any:
    """Return how far an iterator or a file is, as far as can be told."""
    frame = getattr(thing, "gi_frame", None)
    if frame is not None:
        return frame.f_lasti, frame.f_lineno, repr(frame.f_locals)
    if hasattr(thing, "tell"):
        return None if getattr(thing, "closed", False) else thing.tell()
    return length_hint(thing, -1), repr(thing)


def _streams() -> Callable[[], None]:
    """Return what puts the streams of random numbers of torch, numpy and Python back to where they are now."""
    own, of_numpy, of_python = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    started = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    of_cuda = torch.cuda.get_rng_state_all() if started else []

    def restore() -> None:
        torch.set_rng_state(own)
        np.random.set_state(of_numpy)  # noqa: NPY002
        random.setstate(of_python)
        if of_cuda:
            torch.cuda.set_rng_state_all(of_cuda)

    return restore
