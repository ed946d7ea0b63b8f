import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnnft.nn import binarize
from bnnft.tracing.replay import Replay
from bnnft.tracing.trace import Trace


class Tail(nn.Module):
    """What follows the neurons: kernels, weights and a function of neurons and these."""

    def __init__(self, function):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1)))
        self.weight = nn.Parameter(torch.randn(5, 6 * 16, generator=torch.Generator().manual_seed(2)))
        self.function = function

    def forward(self, a):
        return self.function(self, a)


def neurons(samples=7):
    return torch.randn(samples, 4, 4, 4, generator=torch.Generator().manual_seed(0)).sign()


def plain(tail, a):
    return F.linear(binarize(F.conv2d(a, tail.kernel, padding=1)).flatten(1), tail.weight).logsumexp(1)


def in_place(tail, a):
    a = F.max_pool2d(a, 3, 1, 1)
    total = torch.zeros(len(a), 6, 4, 4)
    total[:, :3] = F.conv2d(a, tail.kernel[:3], padding=1)
    total += F.conv2d(a * 0.5, tail.kernel, None, 1, 1)
    part = total[:, 1:2]
    part.mul_(2)
    F.hardtanh(total, inplace=True)
    return (total.flatten(1) @ tail.weight.t()).sum(1)


def twice(tail, a):
    return plain(tail, a) + plain(tail, F.dropout(a.flip(3), training=False))


def changed(a, channel):
    a = a.clone()
    a[:, channel] *= -1
    return a


@pytest.mark.parametrize("function", [plain, in_place, twice])
def test_the_end_is_what_the_whole_gives_with_other_neurons(function):
    model, a = Tail(function), neurons()
    with torch.no_grad(), Trace(model) as trace:
        loss = model(a)
    values = [value.clone() for value in trace.values]
    replay = Replay(trace, [trace.number(a)], trace.number(loss))
    with torch.no_grad():
        assert torch.equal(replay.run(lambda tensor: tensor), loss)
        for channel in (0, 2, 3, 0):
            expected = model(changed(a, channel))
            assert not torch.allclose(expected, loss)
            assert torch.allclose(replay.run(lambda tensor, c=channel: changed(tensor, c)), expected, atol=1e-4)
    assert all(torch.equal(value, before) for value, before in zip(trace.values, values, strict=True))


class Sizes(torch.overrides.TorchFunctionMode):
    """Notes how many channels or features are multiplied."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.conv2d, F.linear):
            self.sizes.append(args[1].shape[1])
        return func(*args, **(kwargs or {}))


def test_only_what_has_changed_is_multiplied():
    model, a = Tail(plain), neurons()
    with torch.no_grad(), Trace(model) as trace:
        loss = model(a)
    replay = Replay(trace, [trace.number(a)], trace.number(loss))
    with Sizes() as noting:
        replay.run(lambda tensor: changed(tensor, 1))
    assert noting.sizes[0] == 1
    with Sizes() as noting:
        replay.run(lambda tensor: tensor)
    assert noting.sizes == []


def test_neurons_that_follow_each_other_all_change():
    """A layer that runs twice: its second output is made of its first one."""

    def recurrent(tail, a):
        return plain(tail, binarize(a + a.roll(1, 2)))

    model, a = Tail(recurrent), neurons()
    with torch.no_grad(), Trace(model) as trace:
        loss = model(a)
    second = next(node.outputs[0] for node in trace.nodes if node.operation == "copysign")
    replay = Replay(trace, [trace.number(a), second], trace.number(loss))
    with torch.no_grad():
        first = changed(a, 1)
        expected = plain(model, changed(binarize(first + first.roll(1, 2)), 1))
        assert torch.allclose(replay.run(lambda tensor: changed(tensor, 1)), expected, atol=1e-4)


def reading(tail, a):
    return plain(tail, a) * (2 if a.sum() > 0 else 1)


def leaving(tail, a):
    return plain(tail, torch.from_numpy(a.numpy() * 1))


def elsewhere(tail, a):
    return plain(tail, torch.ones(7, 4, 4, 4))


def writing_elsewhere(tail, a):
    total = torch.zeros(len(a), 2)
    row = total[:, 0]
    row.copy_(a.flatten(1).sum(1))
    return total.sum(1)


@pytest.mark.parametrize("function", [reading, leaving, elsewhere, writing_elsewhere])
def test_what_cannot_be_run_again_is_refused(function):
    model, a = Tail(function), neurons()
    with torch.no_grad(), Trace(model) as trace:
        loss = model(a)
    with pytest.raises(ValueError, match=r"reads numbers|cannot be seen|writes to a view"):
        Replay(trace, [trace.number(a)], trace.number(loss))
