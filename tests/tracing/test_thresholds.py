import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from bnnft.nn import BinaryActivation
from bnnft.tracing.thresholds import thresholds, thresholds_of_call

real = st.floats(-4, 4, allow_subnormal=False)
signed = st.builds(math.copysign, st.floats(1e-3, 4), st.sampled_from([1.0, -1.0]))


def batch_norm(mean, var, gamma, beta, kind=nn.BatchNorm1d):
    norm = kind(1).double().eval()
    values = (norm.running_mean, mean), (norm.running_var, var), (norm.weight, gamma), (norm.bias, beta)
    for tensor, value in values:
        nn.init.constant_(tensor, value)
    return norm


@given(s=st.integers(-50, 50), mean=real, var=st.floats(0, 9), gamma=signed, beta=real)
def test_sign_of_batch_norm_is_the_comparison_with_the_threshold(s, mean, var, gamma, beta):
    norm = batch_norm(mean, var, gamma, beta)
    threshold = mean - beta * math.sqrt(var + norm.eps) / gamma
    assume(abs(s - threshold) > 1e-6)
    decision = 1.0 if gamma * (s - threshold) >= 0 else -1.0
    assert BinaryActivation()(norm(torch.tensor([[float(s)]]).double())).item() == decision
    assert thresholds(norm).item() == pytest.approx(threshold, rel=1e-9, abs=1e-9)


@given(s=st.integers(-50, 50), mean=real, var=st.floats(0, 9), beta=st.one_of(real, st.just(0.0)))
def test_dead_neuron_gives_the_sign_of_beta_and_its_threshold_is_out_of_reach(s, mean, var, beta):
    norm = batch_norm(mean, var, 0.0, abs(beta) if beta == 0 else beta)
    output = BinaryActivation()(norm(torch.tensor([[float(s)]]).double())).item()
    assert output == (1.0 if beta >= 0 else -1.0)
    assert thresholds(norm).item() == (-math.inf if output > 0 else math.inf)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_thresholds_are_one_a_channel_and_detached(kind):
    norm = kind(3)
    norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert_close(thresholds(norm), torch.tensor([1.0, 2.0, 3.0]))
    assert not thresholds(norm).requires_grad


def test_without_affine_the_threshold_is_the_mean():
    norm = nn.BatchNorm1d(3, affine=False)
    norm.running_mean.copy_(torch.tensor([1.0, -2.0, 0.5]))
    norm.running_var.fill_(4.0)
    assert_close(thresholds(norm), norm.running_mean)


def test_without_running_statistics_there_is_no_threshold():
    with pytest.raises(ValueError, match="no running statistics"):
        thresholds(nn.BatchNorm1d(3, track_running_stats=False))


class Seeing(torch.overrides.TorchFunctionMode):
    """Keeps the thresholds of each call of batch_norm."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ == "batch_norm":
            self.seen.append(thresholds_of_call(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def filled():
    norm = nn.BatchNorm1d(3).eval()
    for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        nn.init.uniform_(tensor, 0.5, 2)
    return norm


def calls(norm):
    """Ways to write the same batch norm."""
    given = norm.running_mean, norm.running_var, norm.weight, norm.bias
    mean, var, gamma, beta = given
    return {
        "module": norm,
        "function": lambda x: F.batch_norm(x, *given),
        "keywords": lambda x: F.batch_norm(x, running_var=var, running_mean=mean, bias=beta, weight=gamma, eps=1e-5),
        "torch": lambda x: torch.batch_norm(x, gamma, beta, mean, var, False, 0.1, 1e-5, False),
    }


@pytest.mark.parametrize("way", ["module", "function", "keywords", "torch"])
def test_thresholds_of_a_call_are_those_of_the_module(way):
    norm = filled()
    with Seeing() as seeing:
        calls(norm)[way](torch.zeros(2, 3))
    assert torch.equal(seeing.seen[0], thresholds(norm))


def test_a_call_that_takes_the_statistics_of_the_batch_has_none():
    for norm in (filled().train(), nn.BatchNorm1d(3, track_running_stats=False).eval()):
        with Seeing() as seeing:
            norm(torch.randn(4, 3))
        assert seeing.seen == [None]
