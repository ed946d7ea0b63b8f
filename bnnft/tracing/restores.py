"""How one thing is put back: a tensor, a container, a generator of random numbers; and the streams of these."""

import random
from collections import deque
from collections.abc import Callable
from operator import length_hint
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# puts one thing back; returns whether it could, which it can too if nothing has moved
Restore = Callable[[], bool]


def restore_of(thing: Any) -> Restore | None:
    """Return what puts an object's own contents back."""
    if isinstance(thing, Tensor):
        return _restore_tensor(thing)
    if isinstance(thing, dict):
        return restore_dict(thing)
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


def _restore_tensor(tensor: Tensor) -> Restore | None:
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


def restore_dict(thing: dict[Any, Any]) -> Restore:
    """Return what puts the entries of a dict back, and their order."""
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


def _restore_sequence(thing: Any) -> Restore:
    before = list(thing)

    def restore() -> bool:
        if len(thing) != len(before) or any(a is not b for a, b in zip(thing, before, strict=True)):
            thing.clear()
            thing.extend(before)
        return True

    return restore


def _restore_set(thing: set[Any]) -> Restore:
    before = set(thing)

    def restore() -> bool:
        thing.intersection_update(before)
        thing.update(before)
        return True

    return restore


def _restore_by(state: Any, put: Callable[[Any], Any]) -> Restore:
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


def restore_streams() -> Callable[[], None]:
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
