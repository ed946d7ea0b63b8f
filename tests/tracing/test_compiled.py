"""Which parts of a model are compiled, and running them as they were written."""

import threading

import pytest
import torch
from torch import nn

from bnnft.tracing.compiled import compiled_modules, uncompiled


def stance():
    return torch._dynamo.eval_frame._stance.stance


def compiled_in_place(module):
    module.compile(backend="eager")
    return module


def wrapped(module):
    return torch.compile(module, backend="eager")


def with_compiled_forward(module):
    module.forward = torch.compile(module.forward, backend="eager")
    return module


class Hidden(nn.Module):
    """A compiled wrapper of its own layer that is no submodule."""

    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
        vars(self)["run"] = wrapped(self.layer)

    def forward(self, x):
        return self.run(self.other(x))


@pytest.mark.parametrize(
    ("compile_", "names"),
    [
        (compiled_in_place, {"1", "1.0"}),
        (wrapped, {"1", "1._orig_mod", "1._orig_mod.0"}),
        (with_compiled_forward, {"1", "1.0"}),
    ],
)
def test_a_compiled_module_is_found_with_all_that_is_inside(compile_, names):
    inner = compile_(nn.Sequential(nn.Linear(2, 2)))
    assert compiled_modules(nn.Sequential(nn.Linear(2, 2), inner, nn.ReLU())) == names


def test_a_module_that_is_compiled_behind_an_attribute_is_found():
    assert compiled_modules(Hidden()) == {"layer"}


def test_a_model_that_is_compiled_whole_is_compiled_in_all_of_its_modules():
    model = wrapped(nn.Sequential(nn.Linear(2, 2)))
    assert compiled_modules(model) == {name for name, _ in model.named_modules()}


def test_nothing_is_compiled_in_a_plain_model():
    assert compiled_modules(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == set()


def test_it_runs_as_it_was_written_inside_and_compiled_outside():
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    model = torch.compile(nn.Linear(2, 2), backend=backend)
    with uncompiled():
        model(torch.ones(1, 2))
        assert not frames
    model(torch.ones(1, 2))
    assert len(frames) == 1


def test_requests_may_end_in_any_order_and_the_last_one_puts_the_stance_back():
    before = stance()
    first, second = uncompiled(), uncompiled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert stance() == "force_eager"
    second.__exit__(None, None, None)
    assert stance() == before


def test_threads_that_overlap_leave_the_stance_as_it_was():
    before, barrier, seen = stance(), threading.Barrier(8), []

    def work():
        for _ in range(50):
            with uncompiled():
                seen.append(stance())
        barrier.wait()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {"force_eager"}
    assert stance() == before


def test_an_error_inside_puts_the_stance_back():
    before = stance()
    with pytest.raises(ZeroDivisionError), uncompiled():
        1 / 0  # noqa: B018
    assert stance() == before
