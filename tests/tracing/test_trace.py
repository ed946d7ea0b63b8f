import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnnft.model import FC, VGG3
from bnnft.tracing.trace import Trace


def images(samples=6, side=8):
    return torch.randn(samples, 1, side, side, generator=torch.Generator().manual_seed(0))


def vectors(samples=12):
    return torch.randn(samples, 6, generator=torch.Generator().manual_seed(0))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def traced(function, x):
    model = Function(function)
    with torch.no_grad(), Trace(model) as trace:
        result = model(x)
    return trace, result


def chained(x):
    y = x.relu()
    y += 1
    y.mul_(2)
    view = y[:, :3]
    view -= 3
    z = y.clone()
    z[:, 0] = view[:, 1]
    F.relu(z, inplace=True)
    torch.add(z, 1, out=z)
    return z.t()


def test_values_are_what_tensors_held_whatever_was_written_later():
    """Every operation, run again on the values that it was given, makes the values that are recorded."""
    trace, result = traced(chained, vectors())
    assert not trace.lost
    assert torch.equal(trace.values[trace.number(result)], result)
    for node in trace.nodes:
        made = node.run(lambda number: trace.values[number].clone())
        # by way of another view of the same memory
        written = {after for before, after in node.written if before not in node.inputs}
        assert made.keys() == set(node.outputs)
        for number in made.keys() - written:
            assert torch.equal(made[number], trace.values[number])
    names = [node.operation for node in trace.nodes]
    assert names == ["relu", "add", "mul", "getitem", "sub", "clone", "getitem", "setitem", "relu", "add", "t"]


def test_a_view_of_what_is_written_to_is_written_too():
    trace, _ = traced(chained, vectors())
    view, below = trace.nodes[3], trace.nodes[4]
    assert [before for before, _ in below.written] == [view.inputs[0], view.outputs[0]]
    base, part = (trace.values[after] for _, after in below.written)
    assert torch.equal(base[:, :3], part)
    assert torch.equal(trace.values[view.outputs[0]] - 3, part)


def test_values_before_a_write_that_nobody_sees_coming_are_lost():
    def silently(x):
        first, second = x.relu(), x.abs()
        torch._foreach_add_([first, second], 1)
        return first + second

    trace, _ = traced(silently, vectors())
    second = trace.nodes[1].outputs[0]
    assert trace.lost == {second}
    assert torch.equal(trace.values[trace.nodes[-1].inputs[1]], vectors().abs() + 1)


def test_what_is_read_into_python_is_noted():
    trace, _ = traced(lambda x: x * x.sum().item() if x.mean() > 0 else x * 2, vectors())
    assert {"bool"} <= {name for name, _ in trace.read}


def test_a_module_that_leaves_torch_is_one_operation():
    trace, _ = traced(lambda x: torch.from_numpy(x.numpy() + 1), vectors())
    assert [node.operation for node in trace.nodes] == ["@"]
    assert trace.nodes[0].call is None


def test_an_alias_is_the_same_value():
    trace, _ = traced(lambda x: x.detach().sign(), vectors())
    assert [node.operation for node in trace.nodes] == ["sign"]


class Fails(nn.Module):
    def forward(self, x):
        raise ArithmeticError


def hooks_of(model):
    return [len(hooks) for module in model.modules() for name, hooks in vars(module).items() if name.endswith("_hooks")]


@pytest.mark.parametrize("fails", [False, True])
def test_tracing_leaves_no_hooks(fails):
    model = nn.Sequential(FC((1, 8, 8), 3, widths=[6, 5]), Fails() if fails else nn.Identity())
    model[0].fc2.register_forward_hook(lambda *_: None)
    before = hooks_of(model)
    try:
        with Trace(model):
            assert hooks_of(model) != before
            model(images())
    except ArithmeticError:
        assert fails
    assert hooks_of(model) == before


def test_tracing_changes_nothing():
    """Outputs, gradients, batch norm statistics and the global random stream are those of an untraced step."""

    def step(is_traced):
        torch.manual_seed(0)
        model = VGG3((1, 8, 8), 3, channels=4, width=6).train()
        model.flatten = nn.Sequential(nn.Flatten(), nn.Dropout())
        if is_traced:
            with Trace(model):
                outputs = model(images())
        else:
            outputs = model(images())
        outputs.square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        return [outputs, *gradients, *model.buffers(), torch.get_rng_state()]

    for watched, alone in zip(step(True), step(False), strict=True):
        assert torch.equal(watched, alone)


def test_compiled_network_is_traced_too():
    model = FC((6,), 3, widths=[5]).eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(vectors())
        with Trace(model) as trace:
            compiled(vectors())
    assert [node.operation for node in trace.nodes].count("batch_norm") == 1
    assert {call.module for call in trace.calls} >= {"fc1", "norm1", "sign1"}


def test_values_whose_memory_is_taken_and_given_to_others_are_lost():
    def exchanging(x):
        weight = torch.ones(6).mul(2)
        y = x * weight
        weight.untyped_storage().resize_(0)
        weight.untyped_storage().resize_(24)
        weight.copy_(torch.zeros(6))
        return y + 1

    trace, result = traced(exchanging, vectors())
    assert trace.error is None
    assert torch.equal(trace.values[trace.number(result)], vectors() * 2 + 1)
