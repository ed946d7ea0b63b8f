import copy
import itertools
import queue
import random
from collections import Counter, OrderedDict, defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from bnnft.tracing.state import unchanged


class Meter:
    """An average as people write them."""

    def __init__(self):
        self.total, self.history = 0.0, [0.0]


def make(**things):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    for name, thing in things.items():
        setattr(model[0], name, thing)
    return model


def kept(model, name):
    return getattr(model[0], name)


# a thing that a module keeps, what a step does to it, and how to look at it
CASES = {
    "number": (lambda: 1, lambda m: setattr(m[0], "it", 2), None),
    "new attribute": (lambda: 1, lambda m: setattr(m[0], "other", 2), lambda m: hasattr(m[0], "other")),
    "removed attribute": (lambda: 1, lambda m: delattr(m[0], "it"), None),
    "list": (lambda: [1], lambda m: kept(m, "it").append(2), None),
    "list of lists": (lambda: [[1], [2]], lambda m: kept(m, "it")[1].append(2), None),
    "list of tensors": (lambda: [torch.zeros(2)], lambda m: kept(m, "it")[0].add_(1), lambda m: kept(m, "it")[0].sum()),
    "dict": (lambda: {"a": 1}, lambda m: kept(m, "it").update(a=2, b=3), None),
    "ordered dict": (
        lambda: OrderedDict(a=1, b=2),
        lambda m: kept(m, "it").move_to_end("a"),
        lambda m: list(kept(m, "it")),
    ),
    "default dict": (lambda: defaultdict(list), lambda m: kept(m, "it")["a"].append(1), lambda m: dict(kept(m, "it"))),
    "counter": (lambda: Counter("ab"), lambda m: kept(m, "it").update("bc"), None),
    "set": (lambda: {1}, lambda m: kept(m, "it").add(2), None),
    "deque": (lambda: deque([1, 2], maxlen=2), lambda m: kept(m, "it").append(3), None),
    "bytes": (lambda: bytearray(b"ab"), lambda m: kept(m, "it").append(1), None),
    "queue": (lambda: filled_queue(), lambda m: kept(m, "it").get(), lambda m: list(kept(m, "it").queue)),
    "array": (
        lambda: np.zeros(2),
        lambda m: kept(m, "it").fill(1),
        lambda m: kept(m, "it").sum(),
    ),
    "object": (Meter, lambda m: vars(kept(m, "it")).update(total=1.0), lambda m: kept(m, "it").total),
    "list in an object": (Meter, lambda m: kept(m, "it").history.append(1), lambda m: list(kept(m, "it").history)),
    "namespace": (lambda: SimpleNamespace(a=1), lambda m: setattr(kept(m, "it"), "a", 2), lambda m: kept(m, "it").a),
    "tensor in place": (lambda: torch.zeros(2), lambda m: kept(m, "it").add_(1), lambda m: kept(m, "it").tolist()),
    "tensor anew": (
        lambda: torch.zeros(2),
        lambda m: setattr(m[0], "it", kept(m, "it") + 1),
        lambda m: kept(m, "it").tolist(),
    ),
    "generator": (
        lambda: torch.Generator().manual_seed(1),
        lambda m: torch.rand(1, generator=kept(m, "it")),
        lambda m: kept(m, "it").get_state().tolist(),
    ),
    "numpy's generator": (
        lambda: np.random.default_rng(1),
        lambda m: kept(m, "it").random(),
        lambda m: str(kept(m, "it").bit_generator.state),
    ),
    "Python's generator": (
        lambda: random.Random(1),
        lambda m: kept(m, "it").random(),
        lambda m: kept(m, "it").getstate(),
    ),
    "metric": (
        lambda: MulticlassAccuracy(3),
        lambda m: kept(m, "it")(torch.eye(3), torch.arange(3)),
        lambda m: (kept(m, "it").tp.tolist(), kept(m, "it")._update_count),
    ),
    "buffer": (lambda: 0, lambda m: m[1](torch.randn(4, 3)), lambda m: [b.tolist() for b in m[1].buffers()]),
    "buffer by data": (lambda: 0, lambda m: m[1].running_mean.data.add_(1), lambda m: m[1].running_mean.tolist()),
    "buffer of another size": (
        lambda: 0,
        lambda m: setattr(m[1].running_mean, "data", torch.ones(5)),
        lambda m: m[1].running_mean.tolist(),
    ),
    "parameter": (lambda: 0, lambda m: m[0].weight.data.mul_(2), lambda m: m[0].weight.tolist()),
    "new parameter": (
        lambda: 0,
        lambda m: m[0].register_parameter("more", nn.Parameter(torch.ones(1))),
        lambda m: [name for name, _ in m.named_parameters()],
    ),
    "frozen parameter": (lambda: 0, lambda m: m.requires_grad_(False), lambda m: m[0].weight.requires_grad),
    "attribute of a parameter": (
        lambda: 0,
        lambda m: setattr(m[0].weight, "org", 1),
        lambda m: hasattr(m[0].weight, "org"),
    ),
    "new module": (lambda: 0, lambda m: m.append(nn.ReLU()), lambda m: len(m)),
    "mode": (lambda: 0, lambda m: m.eval(), lambda m: m[1].training),
    "global stream": (lambda: 0, lambda m: torch.rand(1), lambda m: torch.get_rng_state().tolist()),
    "numpy's stream": (lambda: 0, lambda m: np.random.rand(), lambda m: str(np.random.get_state())),  # noqa: NPY002
    "Python's stream": (lambda: 0, lambda m: random.random(), lambda m: random.getstate()),
}


def filled_queue():
    it = queue.Queue()
    it.put(1)
    it.put(2)
    return it


@pytest.mark.parametrize(("thing", "step", "look"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("fails", [False, True])
def test_what_a_step_changes_is_put_back(thing, step, look, fails):
    model = make(it=thing())
    look = look or (lambda m: copy.deepcopy(kept(m, "it")))
    identity, before = kept(model, "it"), look(model)
    moved = []
    try:
        with unchanged(model) as moved:
            step(model)
            changed = not hasattr(model[0], "it") or look(model) != before
            if fails:
                raise ArithmeticError
    except ArithmeticError:
        assert fails
    assert changed
    assert look(model) == before
    assert kept(model, "it") is identity
    assert moved == []


@pytest.mark.parametrize(
    ("thing", "step"),
    [
        (lambda path: iter([1, 2]), lambda it: next(it)),
        (lambda path: itertools.count(), lambda it: next(it)),
        (lambda path: (number for number in range(3)), lambda it: next(it)),
        (lambda path: path.open("w"), lambda it: it.write("x")),
    ],
)
def test_what_cannot_be_put_back_is_named(thing, step, tmp_path):
    model = make(it=thing(tmp_path / "file"))
    with unchanged(model) as moved:
        pass
    assert moved == []
    with unchanged(model) as moved:
        step(kept(model, "it"))
    assert moved == ["0.it"]
    if hasattr(kept(model, "it"), "close"):
        kept(model, "it").close()


def test_nothing_is_put_back_where_nothing_has_changed():
    """No version moves, so that a graph that was there before can still be run backward."""
    model = make(ema=torch.zeros(3))
    loss = (model(torch.randn(4, 3)) * model[0].ema).sum() + model[0].weight.square().sum()
    with unchanged(model):
        model.eval()(torch.randn(4, 3))
    loss.backward()
    assert model[0].weight.grad is not None


def test_gradients_are_left_alone():
    model = make()
    with unchanged(model):
        model(torch.randn(4, 3)).square().sum().backward()
    assert model[0].weight.grad.any()


def test_an_average_of_weights_with_gaps_and_nan_is_bit_equal_again():
    model = make()
    model.register_buffer("ema", torch.tensor([float("nan"), -0.0, 1.0]))
    with unchanged(model):
        model.ema.fill_(2)
    assert model.ema.tolist()[1:] == [-0.0, 1.0]
    assert model.ema[0].isnan()
    assert torch.signbit(model.ema[1])


def test_signs_of_zeros_come_back():
    model = make()
    model.register_buffer("zeros", torch.tensor([-0.0, 0.0]))
    with unchanged(model):
        model.zeros.neg_()
    assert torch.signbit(model.zeros).tolist() == [True, False]


def test_objects_that_refer_to_each_other_are_looked_at_once():
    model = make(owner=SimpleNamespace(steps=0))
    model[0].owner.model = model
    with unchanged(model):
        model[0].owner.steps += 1
    assert model[0].owner.steps == 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_scripted_modules_are_put_back_too():
    model = nn.Sequential(torch.jit.script(nn.BatchNorm1d(3)))
    before = [buffer.clone() for buffer in model.buffers()]
    with unchanged(model):
        model(torch.randn(4, 3))
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_buffers_of_skipped_parts_change():
    model = make()
    model.register_buffer("steps", torch.zeros(()))
    with unchanged(model, skip=[model[1]]):
        model(torch.randn(4, 3))
        model.steps += 1
    assert (model[1].num_batches_tracked, model.steps) == (1, 0)
    assert model[1].running_mean.any()
