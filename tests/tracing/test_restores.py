import random
from collections import deque

import numpy as np
import pytest
import torch

from bnnft.tracing.restores import restore_dict, restore_of, restore_streams


class LeftAlone:
    left_alone = True


def draws():
    return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()  # noqa: NPY002


def test_streams_go_on_where_they_were():
    restore = restore_streams()
    first = draws()
    restore()
    assert draws() == first


THINGS = {
    "list": ([1, 2], lambda thing: thing.append(3), list),
    "deque": (deque([1, 2], maxlen=2), lambda thing: thing.append(3), list),
    "bytearray": (bytearray(b"ab"), lambda thing: thing.extend(b"c"), bytes),
    "dict": ({"a": 1, "b": 2}, lambda thing: (thing.pop("a"), thing.update(c=3)), lambda thing: list(thing.items())),
    "order": ({"a": 1, "b": 2}, lambda thing: thing.update(a=thing.pop("a")), lambda thing: list(thing.items())),
    "set": ({1, 2}, lambda thing: (thing.remove(1), thing.add(3)), frozenset),
    "array": (np.ones(2), lambda thing: thing.fill(0), lambda thing: thing.tolist()),
    "tensor": (torch.ones(2), lambda thing: thing.zero_(), lambda thing: thing.tolist()),
    "generator": (torch.Generator(), lambda thing: thing.manual_seed(7), lambda thing: thing.initial_seed()),
    "random": (random.Random(0), lambda thing: thing.random(), lambda thing: thing.getstate()),
    "numpy": (np.random.default_rng(0), lambda thing: thing.random(), lambda thing: thing.bit_generator.state),
}


@pytest.mark.parametrize(("thing", "change", "look"), THINGS.values(), ids=THINGS)
def test_each_kind_of_thing_is_put_back_and_says_so(thing, change, look):
    before, restore = look(thing), restore_of(thing)
    change(thing)
    assert look(thing) != before
    assert restore() is True
    assert look(thing) == before


def test_iterators_say_whether_they_have_moved():
    iterator = iter([1, 2])
    restore = restore_of(iterator)
    assert restore() is True
    next(iterator)
    assert restore() is False


@pytest.mark.parametrize("thing", [(1, 2), frozenset([1]), object()], ids=["tuple", "frozenset", "object"])
def test_what_has_no_contents_of_its_own_needs_no_restore(thing):
    assert restore_of(thing) is None


def test_entries_that_say_so_are_left_as_they_are():
    thing = {"a": 1, "hook": (LeftAlone(), 0)}
    restore = restore_dict(thing)
    del thing["hook"]
    thing.update(a=2, other=LeftAlone())
    assert restore() is True
    assert list(thing) == ["a", "other"]
    assert thing["a"] == 1
