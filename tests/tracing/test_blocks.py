from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnnft.injection.sites import find_sites
from bnnft.model import FC, VGG3
from bnnft.nn import BinaryActivation, BinaryConv2d, BinaryLinear, binarize
from bnnft.tracing.blocks import Block, Calls, find_blocks
from bnnft.tracing.trace import Trace


@pytest.fixture(autouse=True)
def fixed_weights():
    torch.manual_seed(0)


def images(samples=6, side=8):
    return torch.randn(samples, 1, side, side, generator=torch.Generator().manual_seed(0))


def vectors(samples=12):
    return torch.randn(samples, 6, generator=torch.Generator().manual_seed(0))


def traced(model, inputs):
    model.eval()
    with torch.no_grad(), Trace(model) as trace:
        model(inputs)
    return find_blocks(trace, [site.layer for site in find_sites(model)])


def chains_of(model, inputs):
    return {layer: chain for layer, (chain, _) in traced(model, inputs).items()}


# chains that are found


def test_chains_of_fc():
    assert chains_of(FC((1, 8, 8), 3, widths=[6, 5]), images()) == {
        "fc1": Block("fc1", "norm1", "sign1"),
        "fc2": Block("fc2", "norm2", "sign2"),
        "fc3": Block("fc3", last=True),
    }


def test_chains_of_vgg3_reach_over_the_pooling():
    assert chains_of(VGG3((1, 8, 8), 3, channels=4, width=6), images()) == {
        "conv1": Block("conv1", "norm1", "sign1"),
        "conv2": Block("conv2", "norm2", "sign2"),
        "fc1": Block("fc1", "norm3", "sign3"),
        "fc2": Block("fc2", last=True),
    }


class OneConvolution(nn.Module):
    """One convolution, whatever ``before`` and ``after`` do around its batch norm, sign, and an output layer."""

    def __init__(self, before=None, after=None, norm=True, positions=64):
        super().__init__()
        # named in another order than they run
        self.out = BinaryLinear(4 * positions, 3, bias=False)
        self.sign = BinaryActivation()
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.conv = BinaryConv2d(1, 4, 3, padding=1, bias=False)
        self.before, self.after = before or nn.Identity(), after or nn.Identity()

    def forward(self, x):
        return self.out(self.sign(self.after(self.norm(self.before(self.conv(x))))).flatten(1))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("around", "positions"),
    [
        pytest.param({}, 64, id="nothing"),
        pytest.param({"before": nn.MaxPool2d(2)}, 16, id="pooling before norm"),
        pytest.param({"before": Function(lambda x: F.max_pool2d(x, 2))}, 16, id="functional pooling"),
        pytest.param({"before": nn.Dropout(), "after": nn.Dropout()}, 64, id="dropout"),
        pytest.param({"after": nn.Hardtanh()}, 64, id="hardtanh"),
        pytest.param({"before": Function(lambda x: x.transpose(2, 3).contiguous())}, 64, id="transpose"),
        pytest.param({"before": Function(lambda x: x.reshape(x.shape[0], 4, 32, 2))}, 64, id="reshape"),
        pytest.param({"before": Function(lambda x: x[:, :, 1:])}, 56, id="index"),
    ],
)
def test_chain_is_found_over_what_stands_between(around, positions):
    assert chains_of(OneConvolution(**around, positions=positions), images()) == {
        "conv": Block("conv", "norm", "sign"),
        "out": Block("out", last=True),
    }


@pytest.mark.parametrize("pooled", [False, True])
def test_trace_returns_the_input_of_batch_norm_and_the_binary_outputs(pooled, randomized):
    pool = nn.MaxPool2d(2) if pooled else nn.Identity()
    model = randomized(OneConvolution(before=pool, positions=16 if pooled else 64))
    found = traced(model, images())
    before = pool(model.conv(images()))
    (s,), (a,) = found["conv"][1].preactivations, found["conv"][1].outputs
    assert torch.equal(s, before)
    assert torch.equal(a, model.sign(model.norm(before)))
    (scores,) = found["out"][1].preactivations
    assert torch.equal(scores, model.out(a.flatten(1)))
    assert found["out"][1].outputs == []


@pytest.mark.parametrize("between", [[], [nn.Hardtanh()]])
def test_without_batch_norm_the_outputs_of_the_layer_are_the_preactivations(between):
    model = nn.Sequential(BinaryLinear(6, 5, bias=False), *between, BinaryActivation(), BinaryLinear(5, 3, bias=False))
    chain, seen = traced(model, vectors())["0"]
    assert chain == Block("0", None, str(1 + len(between)))
    assert torch.equal(seen.preactivations[0], model[0](vectors()))


def test_without_batch_norm_pooled_outputs_are_the_preactivations():
    model = OneConvolution(before=nn.MaxPool2d(2), norm=False, positions=16)
    chain, seen = traced(model, images())["conv"]
    assert chain == Block("conv", None, "sign", pooled=True)
    assert torch.equal(seen.preactivations[0], F.max_pool2d(model.conv(images()), 2))


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = BinaryActivation()

    def forward(self, x):
        return self.inner(x)


def test_activation_is_the_innermost_module_that_returns_the_outputs():
    model = nn.Sequential(BinaryLinear(6, 5), nn.BatchNorm1d(5), Wrapped(), BinaryLinear(5, 3))
    assert chains_of(model, vectors())["0"].activation == "2.inner"


def test_activation_may_leave_torch():
    """What a module computes elsewhere cannot be followed; the module itself can."""
    outside = Function(lambda x: torch.from_numpy(np.where(x.numpy() >= 0, np.float32(1), np.float32(-1))))
    model = nn.Sequential(BinaryLinear(6, 5), nn.BatchNorm1d(5), outside, BinaryLinear(5, 3))
    assert chains_of(model, vectors())["0"] == Block("0", "1", "2")


def test_activation_is_not_a_module_that_passes_the_outputs_on():
    layers = OrderedDict(fc=BinaryLinear(6, 5), norm=nn.BatchNorm1d(5), sign=BinaryActivation(), dropout=nn.Dropout())
    model = nn.Sequential(layers | {"out": BinaryLinear(5, 3)})
    assert chains_of(model, vectors())["fc"].activation == "sign"


def test_scores_of_equal_size_are_not_taken_for_neurons():
    """One score for and one against are two-valued, and so is what a scale makes of them."""
    model = FC((6,), 2, widths=[5])
    with torch.no_grad():
        model.fc2.weight[1] = -model.fc2.weight[0]
    assert chains_of(model, vectors(1))["fc2"] == Block("fc2", last=True)


def test_network_that_ends_with_binary_neurons_has_a_chain():
    model = nn.Sequential(BinaryLinear(6, 5), nn.BatchNorm1d(5), BinaryActivation())
    assert chains_of(model, vectors()) == {"0": Block("0", "1", "2")}


def test_neurons_are_found_whatever_operation_reads_them():
    class Head(Plain):
        def forward(self, x):
            return torch.einsum("ni,oi->no", self.sign1(self.norm1(self.fc1(x))), self.fc3.weight)

    assert chains_of(Head(), vectors())["fc1"] == Block("fc1", "norm1", "sign1")


# modules that several layers or runs share


class Plain(nn.Module):
    """Three binarized layers; subclasses say how they are connected."""

    def __init__(self):
        super().__init__()
        self.fc1 = BinaryLinear(6, 6, bias=False)
        self.fc2 = BinaryLinear(6, 6, bias=False)
        self.fc3 = BinaryLinear(6, 3, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        self.sign1, self.sign2 = BinaryActivation(), BinaryActivation()


class SharedActivation(Plain):
    def forward(self, x):
        x = self.sign1(self.norm1(self.fc1(x)))
        return self.fc3(self.sign1(self.norm2(self.fc2(x))))


class SharedNorm(Plain):
    def forward(self, x):
        x = self.sign1(self.norm1(self.fc1(x)))
        return self.fc3(self.sign2(self.norm1(self.fc2(x))))


class CalledTwice(Plain):
    def forward(self, x):
        for _ in range(2):
            x = self.sign1(self.norm1(self.fc1(x)))
        return self.fc3(x)


class CalledTwiceAndShared(Plain):
    def forward(self, x):
        for _ in range(2):
            x = self.sign1(self.norm1(self.fc1(x)))
        return self.fc3(self.sign1(self.norm2(self.fc2(x))))


@pytest.mark.parametrize(
    ("network", "hidden"),
    [
        (
            SharedActivation,
            [
                Block("fc1", "norm1", "sign1", activation_calls=Calls((0,), 2)),
                Block("fc2", "norm2", "sign1", activation_calls=Calls((1,), 2)),
            ],
        ),
        (
            SharedNorm,
            [
                Block("fc1", "norm1", "sign1", norm_calls=Calls((0,), 2)),
                Block("fc2", "norm1", "sign2", norm_calls=Calls((1,), 2)),
            ],
        ),
        (CalledTwice, [Block("fc1", "norm1", "sign1")]),
        (
            CalledTwiceAndShared,
            [
                Block("fc1", "norm1", "sign1", activation_calls=Calls((0, 1), 3)),
                Block("fc2", "norm2", "sign1", activation_calls=Calls((2,), 3)),
            ],
        ),
    ],
)
@pytest.mark.parametrize("forwards", [1, 2])
def test_each_layer_has_the_runs_that_are_its_own(network, hidden, forwards):
    """However often the network runs in the traced batch; layers that do not run have no chain."""
    model = network().eval()
    with torch.no_grad(), Trace(model) as trace:
        for _ in range(forwards):
            model(vectors())
    chains = {
        layer: chain for layer, (chain, _) in find_blocks(trace, [site.layer for site in find_sites(model)]).items()
    }
    assert chains == {chain.layer: chain for chain in hidden} | {"fc3": Block("fc3", last=True)}


def test_every_run_of_a_layer_is_observed(randomized):
    model = randomized(CalledTwice())
    _, seen = traced(model, vectors())["fc1"]
    first = model.fc1(vectors())
    second = model.fc1(model.sign1(model.norm1(first)))
    for got, expected in zip(seen.preactivations, (first, second), strict=True):
        assert torch.equal(got, expected)
    for got, s in zip(seen.outputs, (first, second), strict=True):
        assert torch.equal(got, model.sign1(model.norm1(s)))


# chains without a known threshold or without neuron outputs, and why


class Residual(Plain):
    def __init__(self, add):
        super().__init__()
        self.add = add

    def forward(self, x):
        skip = self.norm1(self.fc1(x))
        return self.fc3(self.sign2(self.add(self.norm2(self.fc2(self.sign1(skip))), skip)))


def added_in_place(x, skip):
    x += skip
    return x


def added_to_a_part(x, skip):
    x[:, :3] += skip[:, :3]
    return x


@pytest.mark.parametrize(
    "add",
    [
        pytest.param(lambda x, skip: x + skip, id="operator"),
        pytest.param(torch.add, id="function"),
        pytest.param(lambda x, skip: skip - x, id="difference"),
        pytest.param(added_in_place, id="in place"),
        pytest.param(lambda x, skip: x.add_(skip), id="method in place"),
    ],
)
def test_residual_addition_leaves_no_fixed_threshold(add):
    chains = chains_of(Residual(add), vectors())
    assert chains["fc1"] == Block("fc1", "norm1", "sign1")
    assert chains["fc2"].activation == "sign2"
    assert "added" in chains["fc2"].reason


def test_addition_to_a_part_leaves_no_fixed_threshold():
    chain = chains_of(Residual(added_to_a_part), vectors())["fc2"]
    assert not chain.last
    assert chain.reason


def test_values_of_before_a_write_in_place_are_not_mixed_with_those_after():
    """The sign reads the batch norm's output before something is added to it."""

    class Later(Plain):
        def forward(self, x):
            y = self.norm1(self.fc1(x))
            a = self.sign1(y)
            y += 1
            return self.fc3(a + 0 * y)

    assert chains_of(Later(), vectors())["fc1"] == Block("fc1", "norm1", "sign1")


class SideBranch(Plain):
    def forward(self, x):
        s = self.fc1(x)
        y = self.fc2(self.sign1(self.norm1(s)))
        return self.fc3(self.sign2(self.norm2(y + s)))


def test_addition_beside_the_way_to_the_sign_does_not_count():
    chains = chains_of(SideBranch(), vectors())
    assert chains["fc1"] == Block("fc1", "norm1", "sign1")
    assert "added" in chains["fc2"].reason


class Between(Plain):
    """One hidden layer, with a function before and one after its batch norm."""

    def __init__(self, before=None, after=None, norm=None):
        super().__init__()
        self.before, self.after = before or (lambda x: x), after or (lambda x: x)
        self.norm1 = norm or self.norm1

    def forward(self, x):
        return self.fc3(self.sign1(self.after(self.norm1(self.before(self.fc1(x))))))


@pytest.mark.parametrize(
    ("around", "reason"),
    [
        pytest.param({"after": lambda x: x - 0.5}, "added", id="shift"),
        pytest.param({"after": lambda x: -x}, "neg", id="negation"),
        pytest.param({"before": lambda x: x * torch.full((6,), 0.3)}, "mul", id="scale"),
        pytest.param({"norm": nn.LayerNorm(6)}, "layer_norm", id="layer norm"),
        pytest.param({"after": lambda x: F.max_pool1d(x, 3, 1, 1)}, "max_pool1d", id="pooling after norm"),
    ],
)
def test_what_moves_the_threshold_is_named(around, reason):
    chain = chains_of(Between(**around), vectors())["fc1"]
    assert reason in chain.reason
    assert chain.activation == "sign1"


def test_batch_norm_by_free_function_is_no_module():
    class NormByFunction(Plain):
        def forward(self, x):
            return self.fc3(self.sign1(F.batch_norm(self.fc1(x), self.norm1.running_mean, self.norm1.running_var)))

    chain = chains_of(NormByFunction(), vectors())["fc1"]
    assert chain.norm is None
    assert "no module" in chain.reason


def test_module_that_keeps_the_statistics_elsewhere_is_no_batch_norm():
    norm = Function(lambda x: F.batch_norm(x, torch.zeros(6), torch.ones(6)))
    chain = chains_of(Between(norm=norm), vectors())["fc1"]
    assert chain.norm is None
    assert "no module" in chain.reason


def test_relu_network_has_no_binary_outputs():
    model = nn.Sequential(BinaryLinear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), BinaryLinear(5, 3))
    chain = chains_of(model, vectors())["0"]
    assert (chain.activation, chain.last) == (None, False)
    assert "not binary" in chain.reason


def test_layer_before_a_float_layer_is_not_the_last():
    chain = chains_of(nn.Sequential(BinaryLinear(6, 5), nn.ReLU(), nn.Linear(5, 3)), vectors())["0"]
    assert not chain.last


class FreeFunction(Plain):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.fc3(self.function(self.norm1(self.fc1(x))))


@pytest.mark.parametrize(
    "function",
    [
        binarize,
        torch.sign,
        lambda x: torch.where(x >= 0, 1.0, -1.0),
        lambda x: (x >= 0).float() * 2 - 1,
    ],
    ids=["binarize", "sign", "where", "comparison"],
)
def test_outputs_of_a_free_function_are_known_by_their_place(function):
    """No module returns them; there is a threshold, and an operation that makes them."""
    chain = chains_of(FreeFunction(function), vectors())["fc1"]
    assert (chain.norm, chain.activation, chain.last, chain.reason) == ("norm1", None, False, "")
    assert chain.place.module == ""


# the traced run


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
    assert find_blocks(trace, [site.layer for site in find_sites(model)])["fc1"][0] == Block("fc1", "norm1", "sign1")
