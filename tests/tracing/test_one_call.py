from contextlib import contextmanager
from itertools import permutations

import pytest

from bnnft.tracing.one_call import OneCall


class Owner:
    def step(self, batch, batch_idx=0):
        return batch + batch_idx


def noting(notes, name):
    @contextmanager
    def context():
        notes.append(name)
        yield
        notes.append(-name)

    return context


def test_one_call_runs_in_all_contexts_and_the_next_in_none():
    owner, notes = Owner(), []
    for name in (1, 2):
        OneCall(owner, "step", noting(notes, name))
    assert owner.step(3, batch_idx=4) == 7
    assert notes == [2, 1, -1, -2]
    assert vars(owner) == {}
    assert owner.step(3) == 3
    assert len(notes) == 4


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_the_method_is_back_in_whatever_order_they_are_removed(order):
    owner, notes = Owner(), []
    calls = [OneCall(owner, "step", noting(notes, name)) for name in range(3)]
    for place in order:
        calls[place].remove()
    assert vars(owner) == {}
    assert (owner.step(1), notes) == (1, [])


def test_an_attribute_in_the_place_of_the_method_is_back():
    owner = Owner()
    owner.step = own = lambda batch: -batch
    call = OneCall(owner, "step", noting([], 1))
    assert owner.step(2) == -2
    call.remove()
    assert vars(owner) == {"step": own}


def test_an_error_of_the_method_passes_the_context():
    owner, notes = Owner(), []
    OneCall(owner, "step", noting(notes, 1))
    with pytest.raises(TypeError):
        owner.step("a", 1)
    assert notes == [1]
    assert vars(owner) == {}
