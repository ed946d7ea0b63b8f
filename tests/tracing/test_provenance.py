"""Which tensors are made of parameters and constants alone, and which operands the batch is combined with."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnnft.tracing.provenance import Provenance


class Model(nn.Module):
    """One parameter, one buffer, and a function of them and the batch that keeps what it likes."""

    def __init__(self, function):
        super().__init__()
        self.w, self.function, self.kept = nn.Parameter(torch.randn(4, 6)), function, None
        self.register_buffer("scale", torch.rand(4, 1))

    def forward(self, x):
        self.kept = self.function(self, x)
        return x


class Watching(Provenance):
    """Keeps what it is asked about."""

    def __init__(self, model):
        super().__init__(model)
        self.made_of, self.uses, self.reads = [], [], []

    def made(self, result, step, elements, origin):
        self.made_of.append((step.operation, tuple(result.shape)))
        return result, None

    def used(self, operand, operation, first, origin):
        self.uses.append((operation, first, sorted(origin.parameters)))
        return operand

    def read(self, parameter, values, operation):
        self.reads.append((parameter, operation))
        return values


def watched(function, batch=3):
    model, x = Model(function), torch.randn(batch, 6)
    with Watching(model) as mode:
        model(x)
        with torch._C.DisableTorchFunction():
            origin = mode.origins.of(model.kept) if isinstance(model.kept, torch.Tensor) else None
    return mode, origin


OF_W = {
    "computed": lambda m, x: (m.w * 2 + 1).tanh(),
    "with a buffer": lambda m, x: m.w / m.scale,
    "with constants": lambda m, x: m.w + torch.ones(4, 6) * torch.arange(6),
    "with a number": lambda m, x: m.w * 3,
    "with a number of the batch": lambda m, x: m.w * x.mean(),
    "with random numbers of its shape": lambda m, x: m.w + torch.rand(m.w.shape),
    "with random numbers for its rows": lambda m, x: m.w + torch.randn(4, 1),
    "with random numbers like it": lambda m, x: (torch.rand_like(m.w) - 0.5) * m.w,
    "dropped out": lambda m, x: F.dropout(m.w),
    "in a form of the batch": lambda m, x: x.new_zeros(4, 6) + m.w,
    "written into constants": lambda m, x: torch.zeros(4, 6).copy_(m.w),
    "written into memory of the batch": lambda m, x: (x.new_empty(24) + x.sum()).copy_(m.w.detach().flatten()),
    "set in a copy": lambda m, x: m.w.detach().clone().masked_fill_(m.w > 0, 1.0),
    "into a given tensor": lambda m, x: torch.mul(m.w.detach(), 2, out=torch.empty(4, 6)),
    "without a graph": lambda m, x: m.w.data.sign(),
    "typed as the batch": lambda m, x: m.w.type_as(x),
    "in a list": lambda m, x: torch.stack([m.w, m.w]),
    "by names": lambda m, x: torch.add(input=m.w, other=m.scale),
}


@pytest.mark.parametrize("function", OF_W.values(), ids=OF_W)
def test_what_is_made_of_a_parameter_and_constants_alone_is_of_the_parameter(function):
    mode, origin = watched(function)
    assert origin is not None
    assert origin.parameters == {"w"}
    assert not any(parameters == [] for *_, parameters in mode.uses)


CONSTANT = {
    "ones": lambda m, x: torch.ones(3, 3),
    "numbers in the code": lambda m, x: torch.tensor([1.0, -1.0]),
    "buffers": lambda m, x: m.scale * 2,
    "forms of a parameter": lambda m, x: torch.zeros_like(m.w),
}


@pytest.mark.parametrize("function", CONSTANT.values(), ids=CONSTANT)
def test_constants_are_made_of_no_parameter(function):
    _, origin = watched(function)
    assert origin is not None
    assert origin.parameters == frozenset()


OF_BATCH = {
    "combined": lambda m, x: F.linear(x, m.w),
    "the batch": lambda m, x: x * 2,
    "written with the batch": lambda m, x: torch.zeros(x.shape).add_(x),
    "into a given tensor": lambda m, x: torch.mul(x, 2, out=torch.empty(x.shape)),
    "noise": lambda m, x: F.linear(torch.randn(3, 6), m.w),
    "noise of the shape of a parameter": lambda m, x: F.linear(torch.randn(4, 6), m.w),
    "noise like the batch": lambda m, x: F.linear(torch.randn_like(x), m.w),
    "noise that is made in place": lambda m, x: F.linear(torch.empty(4, 6).normal_(), m.w),
    "data": lambda m, x: F.linear(torch.tensor([[1.0] * 6] * 20), m.w),
    "a gradient": lambda m, x: torch.autograd.grad(F.linear(x, m.w).sum(), m.w)[0],
}


@pytest.mark.parametrize("function", OF_BATCH.values(), ids=OF_BATCH)
@pytest.mark.parametrize("batch", [3, 4])
def test_everything_else_is_of_the_batch(function, batch):
    """Also in a batch that has the shape of the parameter."""
    _, origin = watched(function, batch)
    assert origin is None


def test_noise_like_noise_is_of_the_batch():
    _, origin = watched(lambda m, x: F.linear(torch.randn_like(torch.randn(4, 6)), m.w))
    assert origin is None


USES = {
    "linear": (lambda m, x: F.linear(x, m.w * 2), [("linear", False)]),
    "product": (lambda m, x: x @ m.w.t(), [("matmul", False)]),
    "weight first": (lambda m, x: m.w @ x.t(), [("matmul", True)]),
    "by names": (lambda m, x: F.linear(weight=m.w, input=x), [("linear", True)]),
    "element by element": (lambda m, x: (x[:, None] * m.w).sum(-1), [("mul", False)]),
    "twice": (lambda m, x: F.linear(F.linear(x, m.w), m.w.t()), [("linear", False)] * 2),
    "in place": (lambda m, x: x[:, None].repeat(1, 4, 1).mul_(m.w), [("mul", False)]),
    "none": (lambda m, x: m.w.sum() + 1, []),
}


@pytest.mark.parametrize(("function", "uses"), USES.values(), ids=USES)
def test_uses_are_where_an_operation_combines_an_operand_with_the_batch(function, uses):
    mode, _ = watched(function)
    assert mode.uses == [(operation, first, ["w"]) for operation, first in uses]


def test_a_parameter_is_read_where_an_operation_computes_with_it_and_not_where_it_is_moved():
    mode, _ = watched(lambda m, x: F.linear(x, m.w.t().t() * 2))
    assert mode.reads == [("w", "mul")]


def test_what_is_made_of_a_parameter_is_shown_once_each():
    mode, _ = watched(lambda m, x: F.linear(x, (m.w * 2).sign()))
    assert mode.made_of == [("mul", (4, 6)), ("sign", (4, 6))]


def test_writes_to_a_parameter_leave_it_one():
    def function(model, x):
        with torch.no_grad():
            model.w.clamp_(-1, 1)
        return F.linear(x, model.w)

    mode, _ = watched(function)
    assert mode.uses == [("linear", False, ["w"])]


@pytest.mark.parametrize("call", ["module", "thread"])
def test_it_is_active_in_the_modules_forward_in_every_thread(call):
    model = Model(lambda m, x: F.linear(x, m.w * 2))
    with Watching(model) as mode:
        if call == "thread":
            thread = threading.Thread(target=model, args=(torch.randn(3, 6),))
            thread.start()
            thread.join()
        else:
            model(torch.randn(3, 6))
    assert mode.uses == [("linear", False, ["w"])]


def test_the_place_is_the_innermost_module_that_runs():
    places = []

    class Places(Watching):
        def used(self, operand, operation, first, origin):
            places.append((self.place, self.in_forward))
            return operand

    inner = Model(lambda m, x: F.linear(x, m.w))
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6, bias=False), inner))
    with Places(model):
        model(torch.randn(3, 6))
        F.linear(torch.randn(3, 6), inner.w)
    assert places == [("0.0", True), ("0.1", True), ("", False)]


def test_nothing_is_left_after_it_and_modes_that_were_entered_since_stay():
    model = Model(lambda m, x: F.linear(x, m.w))
    other = Watching(nn.Linear(2, 2))
    mode = Watching(model)
    mode.__enter__()
    other.__enter__()
    mode.__exit__(None, None, None)
    assert torch.overrides._get_current_function_mode_stack() == [other]
    other.__exit__(None, None, None)
    assert torch.overrides._get_current_function_mode_stack() == []
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_always_called for m in model.modules())


def test_hooks_of_a_copy_take_themselves_away():
    model = Model(lambda m, x: F.linear(x, m.w))
    with Watching(model):
        copied = copy.deepcopy(model)
    copied(torch.randn(3, 6))
    assert not any([copied._forward_hooks, copied._forward_pre_hooks, copied._forward_hooks_always_called])


def test_our_own_operations_are_seen_by_no_other_mode():
    class Names(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    model, names = Model(lambda m, x: F.linear(x, m.w.sign())), []
    with Names(), Watching(model):
        names.clear()
        x = torch.ones(3, 6)
        model(x)
    assert names == ["ones", "sign", "linear"]
