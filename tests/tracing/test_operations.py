"""What torch's operations do, by their names, and backwards under a mode."""

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bnnft.tracing.operations import JOINING, REARRANGING, SAME_ORDER, backward_of, brings, draws, writes


@pytest.mark.parametrize("operation", sorted(REARRANGING - {"get", "alias", "requires_grad"}))
def test_rearranging_operations_are_operations_of_torch(operation):
    names = {operation, f"{operation}_", f"__{operation}__"}
    assert any(hasattr(Tensor, name) or hasattr(torch, name) for name in names)


def test_the_kinds_of_operations_are_parts_of_each_other():
    assert SAME_ORDER < REARRANGING
    assert JOINING < REARRANGING
    assert not JOINING & SAME_ORDER


@pytest.mark.parametrize("name", ["add_", "mul_", "__setitem__", "__iadd__", "__ior__", "__set__", "copy_"])
def test_operations_that_write_to_their_first_operand(name):
    assert writes(name)


@pytest.mark.parametrize("name", ["add", "__add__", "__getitem__", "__get__", "__index__", "__int__", "__invert__"])
def test_operations_that_do_not(name):
    assert not writes(name)


def test_data_that_is_brought_in_may_be_small_enough_to_be_written_in_the_code():
    assert brings("tensor", torch.ones(65))
    assert not brings("tensor", torch.ones(64))
    assert brings("from_numpy", torch.ones(9, 9))
    assert not brings("ones", torch.ones(65))


def test_operations_that_draw_random_numbers():
    assert all(map(draws, ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "uniform")))
    assert not any(map(draws, ("ones", "arange", "tensor", "add")))


class Again(TorchFunctionMode):
    """Runs backwards by what is tested, and keeps the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        backward = backward_of(func, args, kwargs or {})
        if backward is None:
            return func(*args, **(kwargs or {}))
        with self:
            return backward()


class Seen(torch.autograd.Function):
    """Does an operation in its backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.cosh()


CALLS = {
    "backward": lambda loss, x: loss.backward(),
    "with a gradient": lambda loss, x: loss.backward(torch.ones(())),
    "with a named gradient": lambda loss, x: loss.backward(gradient=torch.ones(()), retain_graph=True),
    "with inputs": lambda loss, x: loss.backward(inputs=[x]),
    "autograd.backward": lambda loss, x: torch.autograd.backward(loss),
    "autograd.grad": lambda loss, x: setattr(x, "grad", torch.autograd.grad(loss, x)[0]),
    "autograd.grad, batched": lambda loss, x: setattr(x, "grad", torch.autograd.grad(loss, [x], create_graph=True)[0]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_backward_runs_under_the_mode_and_gives_its_gradient(call):
    x = torch.ones(3, requires_grad=True)
    loss = Seen.apply(x).sum()
    with Again() as mode:
        call(loss, x)
    assert mode.names.count("cosh") == 1
    assert torch.allclose(x.grad, torch.ones(3).cosh())


def test_other_operations_are_no_backward():
    assert backward_of(torch.add, (1, 2), {}) is None
