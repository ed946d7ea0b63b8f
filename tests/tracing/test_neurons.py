import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from bnnft.model import FC, VGG3
from bnnft.nn import BinaryActivation, BinaryConv2d, BinaryLinear
from bnnft.tracing.blocks import Block, Calls
from bnnft.tracing.neurons import thresholds, watch

FC_CHAINS = [Block("fc1", "norm1", "sign1"), Block("fc2", "norm2", "sign2"), Block("fc3", last=True)]
VGG3_CHAINS = [Block("conv1", "norm1", "sign1"), Block("conv2", "norm2", "sign2"), Block("fc1", "norm3", "sign3")]
VGG3_CHAINS += [Block("fc2", last=True)]


@pytest.fixture
def fc(randomized):
    return randomized(FC((1, 8, 8), 3, widths=[6, 5]))


@pytest.fixture
def vgg3(randomized):
    return randomized(VGG3((1, 8, 8), 3, channels=4, width=6))


def images(samples=6, side=8, seed=0):
    return torch.randn(samples, 1, side, side, generator=torch.Generator().manual_seed(seed))


def vectors(samples=12, seed=0):
    return torch.randn(samples, 6, generator=torch.Generator().manual_seed(seed))


# thresholds

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


# watching


class Fails(nn.Module):
    def forward(self, x):
        raise ArithmeticError


def hooks_of(model):
    return [len(hooks) for module in model.modules() for name, hooks in vars(module).items() if name.endswith("_hooks")]


@pytest.mark.parametrize("fails", [False, True])
def test_watching_leaves_no_hooks(fails, fc):
    fc.fc2.register_forward_hook(lambda *_: None)
    before = hooks_of(fc)
    model = nn.Sequential(fc, Fails() if fails else nn.Identity())
    try:
        with watch(fc, FC_CHAINS):
            assert hooks_of(fc) != before
            model(images())
    except ArithmeticError:
        assert fails
    assert hooks_of(fc) == before


def by_hand(model, x):
    """Run a sequential network; return the input of each batch norm, then the scores, and the output of each sign."""
    preactivations, outputs, scores = [], [], None
    for module in model:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            preactivations.append(x)
        x = module(x)
        if isinstance(module, BinaryActivation):
            outputs.append(x)
        if isinstance(module, BinaryLinear):
            scores = x
    return [*preactivations, scores], [*outputs, None]


@pytest.mark.parametrize(("network", "chains"), [("fc", FC_CHAINS), ("vgg3", VGG3_CHAINS)])
def test_watch_collects_what_is_recomputed_by_hand(network, chains, request):
    model = request.getfixturevalue(network)
    with torch.no_grad(), watch(model, chains) as seen:
        for seed in (1, 2):
            model(images(seed=seed))
    for call, seed in enumerate((1, 2)):
        preactivations, outputs = by_hand(model, images(seed=seed))
        for chain, s, a in zip(chains, preactivations, outputs, strict=True):
            assert torch.equal(seen[chain.layer].preactivations[call], s)
            assert (seen[chain.layer].outputs == []) if a is None else torch.equal(seen[chain.layer].outputs[call], a)
    assert all(len(observation.preactivations) == 2 for observation in seen.values())


class Shared(nn.Module):
    """Two layers with one batch norm and one activation between them."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = BinaryLinear(6, 6, bias=False), BinaryLinear(6, 6, bias=False)
        self.norm, self.sign = nn.BatchNorm1d(6), BinaryActivation()

    def forward(self, x):
        return self.sign(self.norm(self.fc2(self.sign(self.norm(self.fc1(x))))))


def test_watch_tells_layers_apart_that_share_their_modules(randomized):
    model = randomized(Shared())
    chains = [Block(f"fc{n + 1}", "norm", "sign", "", False, False, Calls((n,), 2), Calls((n,), 2)) for n in range(2)]
    with torch.no_grad(), watch(model, chains) as seen:
        model(vectors())
        model(vectors(seed=1))
    for call in range(2):
        first = model.fc1(vectors(seed=call))
        second = model.fc2(model.sign(model.norm(first)))
        for layer, s in (("fc1", first), ("fc2", second)):
            assert torch.equal(seen[layer].preactivations[call], s)
            assert torch.equal(seen[layer].outputs[call], model.sign(model.norm(s)))


def test_watch_without_batch_norm_collects_the_outputs_of_the_layer():
    model = nn.Sequential(BinaryLinear(6, 5), nn.Hardtanh(), BinaryActivation())
    with torch.no_grad(), watch(model, [Block("0", None, "2")]) as seen:
        model(vectors())
    assert torch.equal(seen["0"].preactivations[0], model[0](vectors()))


def test_watch_with_pooling_alone_collects_the_inputs_of_the_activation():
    model = nn.Sequential(BinaryConv2d(1, 4, 3), nn.MaxPool2d(2), BinaryActivation())
    with torch.no_grad(), watch(model, [Block("0", None, "2", pooled=True)]) as seen:
        model(images())
    assert torch.equal(seen["0"].preactivations[0], model[:2](images()))


@pytest.mark.parametrize("graph", [False, True])
def test_watching_changes_nothing(graph):
    """Outputs, gradients, batch norm statistics and the global random stream are those of an unwatched step."""

    def step(watched):
        torch.manual_seed(0)
        model = FC((1, 8, 8), 3, widths=[6, 5]).train()
        model.flatten = nn.Sequential(nn.Flatten(), nn.Dropout())
        torch.manual_seed(1)
        if watched:
            with watch(model, FC_CHAINS, graph=graph):
                outputs = model(images())
        else:
            outputs = model(images())
        outputs.square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        return [outputs, *gradients, *model.buffers(), torch.get_rng_state()]

    for watched, alone in zip(step(True), step(False), strict=True):
        assert torch.equal(watched, alone)


def test_watched_outputs_hold_no_graph_unless_asked(fc):
    with watch(fc, FC_CHAINS) as seen:
        fc(images())
    assert not any(tensor.requires_grad for o in seen.values() for tensor in o.outputs + o.preactivations)


@pytest.mark.parametrize("frozen", [False, True])
def test_graph_gives_the_gradients_of_the_outputs(frozen, fc):
    model = fc.requires_grad_(not frozen)
    with watch(model, FC_CHAINS[:2], graph=True) as seen:
        loss = model(images()).square().sum()
    got = torch.autograd.grad(loss, [seen["fc1"].outputs[0], seen["fc2"].outputs[0]])
    first = model.sign1(model.norm1(model.fc1(images().flatten(1)))).detach().requires_grad_()
    second = model.sign2(model.norm2(model.fc2(first)))
    expected = torch.autograd.grad(model.scale(model.fc3(second)).square().sum(), [first, second])
    assert_close(got, expected)


def test_compiled_network_is_watched_too(randomized):
    model = randomized(nn.Sequential(BinaryLinear(6, 5), nn.BatchNorm1d(5), BinaryActivation()))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(vectors())
        with watch(model, [Block("0", "1", "2")]) as seen:
            outputs = compiled(vectors())
    assert torch.equal(seen["0"].outputs[0], outputs)
