import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnnft.injection.sites import find_sites
from bnnft.model import FC, VGG3
from bnnft.nn import BinaryActivation, BinaryConv2d, BinaryLinear, binarize
from bnnft.tracing.axis import Axis
from bnnft.tracing.blocks import find_blocks
from bnnft.tracing.neurons import thresholds, watch
from bnnft.tracing.trace import Trace


@pytest.fixture(autouse=True)
def fixed_weights():
    torch.manual_seed(0)


def images(samples=6, side=8):
    return torch.randn(samples, 1, side, side, generator=torch.Generator().manual_seed(0))


def vectors(samples=12):
    return torch.randn(samples, 6, generator=torch.Generator().manual_seed(0))


def found_in(model, inputs):
    model.eval()
    with torch.no_grad(), Trace(model) as trace:
        model(inputs)
    return find_blocks(trace, [site.layer for site in find_sites(model)])


def blocks_of(model, inputs):
    return {layer: block for layer, (block, _) in found_in(model, inputs).items()}


def by_hand(model, inputs, before, after):
    """What one module is given and another one returns, in each of their runs."""
    given, returned, handles = [], [], []
    handles.append(model.get_submodule(before).register_forward_pre_hook(lambda _, args: given.append(args[0].clone())))
    handles.append(model.get_submodule(after).register_forward_hook(lambda _, args, out: returned.append(out.clone())))
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return given, returned


def check(model, inputs, expected, last):
    """What is found and what is watched are what the named modules are given and return.

    Args:
        expected: of each hidden layer the module that is given its pre-activations, the one that returns its neurons,
            and which of their runs these are.
        last: the layer whose outputs are class scores.
    """
    found = found_in(model, inputs)
    assert {layer for layer, (block, _) in found.items() if block.last} == {last}
    assert found.keys() == expected.keys() | {last}
    with torch.no_grad(), watch(model, [block for block, _ in found.values()]) as seen:
        scores = model(inputs)
    assert torch.equal(seen[last].preactivations[0], scores)
    for layer, (before, after, *runs) in expected.items():
        block, traced = found[layer]
        assert (block.reason, block.has_outputs) == ("", True)
        given, returned = by_hand(model, inputs, before, after)
        numbers = runs[0] if runs else range(len(given))
        for observed in (traced, seen[layer]):
            assert len(observed.preactivations) == len(observed.outputs) == len(numbers)
            for number, s, a in zip(numbers, observed.preactivations, observed.outputs, strict=True):
                assert torch.equal(s, given[number])
                assert torch.equal(a, returned[number])


# blocks that are found


def test_blocks_of_fc():
    expected = {"fc1": ("norm1", "sign1"), "fc2": ("norm2", "sign2")}
    model = FC((1, 8, 8), 3, widths=[6, 5])
    model.scale = nn.Identity()
    check(model, images(), expected, "fc3")


def test_blocks_of_vgg3_reach_over_the_pooling():
    expected = {"conv1": ("norm1", "sign1"), "conv2": ("norm2", "sign2"), "fc1": ("norm3", "sign3")}
    model = VGG3((1, 8, 8), 3, channels=4, width=6)
    model.scale = nn.Identity()
    check(model, images(), expected, "fc2")


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
def test_neurons_are_found_over_what_stands_between(around, positions, randomized):
    model = randomized(OneConvolution(**around, positions=positions))
    check(model, images(), {"conv": ("norm", "sign")}, "out")


@pytest.mark.parametrize("between", [[], [nn.Hardtanh()], [nn.Hardtanh(inplace=True)], [nn.Dropout(inplace=True)]])
def test_without_batch_norm_the_outputs_of_the_layer_are_the_preactivations(between):
    """As they were before anything was written to their memory."""
    layers = [BinaryLinear(6, 5, bias=False), nn.Identity(), *between, BinaryActivation(), BinaryLinear(5, 3)]
    check(nn.Sequential(*layers), vectors(), {"0": ("1", str(2 + len(between)))}, str(len(layers) - 1))


def test_without_batch_norm_pooled_outputs_are_the_preactivations():
    model = OneConvolution(before=nn.MaxPool2d(2), norm=False, positions=16)
    check(model, images(), {"conv": ("norm", "sign")}, "out")  # the norm is an identity


def test_thresholds_are_those_of_the_batch_norm(randomized):
    model = randomized(OneConvolution())
    block, seen = found_in(model, images())["conv"]
    assert torch.equal(seen.thresholds[0], thresholds(model.norm))
    with torch.no_grad(), watch(model, [block]) as watched:
        model.norm.running_mean += 1
        model(images())
    assert torch.equal(watched["conv"].thresholds[0], thresholds(model.norm))


def test_activation_may_leave_torch(randomized):
    """What a module computes elsewhere cannot be followed; the module itself can."""
    outside = Function(lambda x: torch.from_numpy(np.where(x.numpy() >= 0, np.float32(1), np.float32(-1))))
    model = nn.Sequential(BinaryLinear(6, 5), nn.BatchNorm1d(5), outside, BinaryLinear(5, 3))
    check(randomized(model), vectors(), {"0": ("1", "2")}, "3")


def test_scores_of_equal_size_are_not_taken_for_neurons():
    """One score for and one against are two-valued, and so is what a scale makes of them."""
    model = FC((6,), 2, widths=[5])
    with torch.no_grad():
        model.fc2.weight[1] = -model.fc2.weight[0]
    assert blocks_of(model, vectors(1))["fc2"].last


def test_network_that_ends_with_binary_neurons_has_neurons():
    model = nn.Sequential(BinaryLinear(6, 5), nn.BatchNorm1d(5), BinaryActivation())
    block = blocks_of(model, vectors())["0"]
    assert (block.has_outputs, block.last, block.reason) == (True, False, "")


class Plain(nn.Module):
    """Three binarized layers; subclasses say how they are connected."""

    def __init__(self):
        super().__init__()
        self.fc1 = BinaryLinear(6, 6, bias=False)
        self.fc2 = BinaryLinear(6, 6, bias=False)
        self.fc3 = BinaryLinear(6, 3, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        self.sign1, self.sign2 = BinaryActivation(), BinaryActivation()


def test_neurons_are_found_whatever_operation_reads_them():
    class Head(Plain):
        def forward(self, x):
            return torch.einsum("ni,oi->no", self.sign1(self.norm1(self.fc1(x))), self.fc3.weight)

    assert blocks_of(Head(), vectors())["fc1"].has_outputs


def test_activations_on_the_left_of_a_product_are_found(randomized):
    class Left(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(inputs, outputs))

        def forward(self, x):
            return x @ binarize(self.kernel)

    model = nn.Sequential(Left(6, 5), nn.BatchNorm1d(5), BinaryActivation(), Left(5, 3))
    randomized(model)
    with torch.no_grad(), Trace(model) as trace:
        model(vectors())
    found = find_blocks(trace, ["0", "3"])
    assert torch.equal(found["0"][1].outputs[0], model[:3](vectors()))
    assert found["3"][0].last


# signs that stand in the forward of a parent module


class _Ste(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign().mul(0.5)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def through(x):
    clipped = x.clamp(-1, 1)
    return clipped + (clipped.sign() - clipped).detach()


SIGNS = {
    "binarize": binarize,
    "sign": torch.sign,
    "where": lambda x: torch.where(x >= 0, 1.0, -1.0),
    "comparison": lambda x: (x >= 0).float() * 2 - 1,
    "straight-through": lambda x: x + (torch.where(x >= 0, 1.0, -1.0) - x).detach(),
    "clipped straight-through": through,
    "two operations in a function": _Ste.apply,
    "scaled": lambda x: x.sign() * 0.25,
    "in place": lambda x: x.clone().sign_(),
}


class Inline(Plain):
    """Batch norm and sign of two layers in one forward, the first of them written as operations."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        first = self.function(self.norm1(self.fc1(x)))
        self.first = first.clone()
        return self.fc3(self.function(self.norm2(self.fc2(first))))


@pytest.mark.parametrize("function", SIGNS.values(), ids=SIGNS.keys())
def test_neurons_that_no_module_returns_are_found(function, randomized):
    model = randomized(Inline(function))
    found = found_in(model, vectors())
    for layer, norm in (("fc1", "norm1"), ("fc2", "norm2")):
        block, seen = found[layer]
        assert (block.reason, block.last, block.has_outputs) == ("", False, True)
        given, returned = by_hand(model, vectors(), norm, norm)
        assert torch.equal(seen.preactivations[0], given[0])
        assert torch.equal(seen.outputs[0], function(returned[0]))
    assert torch.equal(found["fc1"][1].outputs[0], model.first)
    assert found["fc3"][0].last


def test_layers_that_binarize_their_own_input_leave_the_neurons_to_the_layer_before(randomized):
    class Next(BinaryLinear):
        def forward(self, x):
            return super().forward(through(x))

    model = randomized(nn.Sequential(Next(6, 5), nn.BatchNorm1d(5), Next(5, 3)))
    block, seen = found_in(model, vectors())["0"]
    assert block.reason == ""
    assert torch.equal(seen.outputs[0], through(model[:2](vectors())))


def test_what_follows_a_batch_norm_by_function_has_its_thresholds(randomized):
    class ByFunction(Plain):
        def forward(self, x):
            norm = self.norm1
            values = F.batch_norm(self.fc1(x), norm.running_mean, norm.running_var, norm.weight, norm.bias)
            return self.fc3(self.sign1(values))

    model = randomized(ByFunction())
    block, seen = found_in(model, vectors())["fc1"]
    assert (block.reason, block.normed) == ("", True)
    assert torch.equal(seen.thresholds[0], thresholds(model.norm1))
    with torch.no_grad(), watch(model, [block]) as watched:
        model(vectors())
    assert torch.equal(watched["fc1"].thresholds[0], thresholds(model.norm1))


def test_ties_at_zero_are_signs_and_a_mask_makes_ternary_outputs(randomized):
    """torch.sign of sums of four signs is 0 for three in eight; a ternary quantizer makes zeros of other values."""
    signs = vectors(64)[:, :4].sign()
    ties = nn.Sequential(BinaryLinear(4, 8, bias=False), Function(torch.sign), BinaryLinear(8, 3))
    assert blocks_of(ties, signs)["0"].has_outputs
    ternary = nn.Sequential(
        BinaryLinear(4, 8, bias=False), Function(lambda x: x.sign() * (x.abs() > 3)), BinaryLinear(8, 3)
    )
    block = blocks_of(ternary, signs)["0"]
    assert (block.has_outputs, block.reason) == (False, "its outputs are not binary")


# modules that several layers or runs share, and layers of one shape


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


class Listed(Plain):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([BinaryLinear(6, 6, bias=False) for _ in range(2)])

    def forward(self, x):
        for layer, norm, sign in zip(self.layers, (self.norm1, self.norm2), (self.sign1, self.sign2), strict=True):
            x = sign(norm(layer(x)))
        return self.fc3(x)


@pytest.mark.parametrize(
    ("network", "hidden"),
    [
        (SharedActivation, {"fc1": ("norm1", "sign1", [0]), "fc2": ("norm2", "sign1", [1])}),
        (SharedNorm, {"fc1": ("norm1", "sign1", [0]), "fc2": ("norm1", "sign2", [1])}),
        (CalledTwice, {"fc1": ("norm1", "sign1", [0, 1])}),
        (CalledTwiceAndShared, {"fc1": ("norm1", "sign1", [0, 1]), "fc2": ("norm2", "sign1", [2])}),
        (Listed, {"layers.0": ("norm1", "sign1"), "layers.1": ("norm2", "sign2")}),
    ],
)
def test_each_layer_has_the_runs_that_are_its_own(network, hidden, randomized):
    model = randomized(network())
    found = found_in(model, vectors())
    with torch.no_grad(), watch(model, [block for block, _ in found.values()]) as seen:
        model(vectors())
    for layer, (norm, sign, *runs) in hidden.items():
        given, _ = by_hand(model, vectors(), norm, norm)
        _, returned = by_hand(model, vectors(), sign, sign)
        for observed in (found[layer][1], seen[layer]):
            norms = runs[0] if runs and len(given) > 1 else [0] * len(observed.preactivations)
            signs = runs[0] if runs and len(returned) > 1 else [0]
            assert len(observed.preactivations) == len(norms)
            assert all(torch.equal(s, given[n]) for n, s in zip(norms, observed.preactivations, strict=True))
            assert len(observed.outputs) == len(signs)
            assert all(torch.equal(a, returned[n]) for n, a in zip(signs, observed.outputs, strict=True))


# blocks without a known threshold or without neuron outputs, and why


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
    blocks = blocks_of(Residual(add), vectors())
    assert blocks["fc1"].reason == ""
    assert blocks["fc2"].has_outputs
    assert "added" in blocks["fc2"].reason


def test_addition_to_a_part_leaves_no_fixed_threshold():
    block = blocks_of(Residual(added_to_a_part), vectors())["fc2"]
    assert not block.last
    assert block.reason


def test_values_of_before_a_write_in_place_are_not_mixed_with_those_after(randomized):
    """The sign reads the batch norm's output before something is added to it."""

    class Later(Plain):
        def forward(self, x):
            y = self.norm1(self.fc1(x))
            a = self.sign1(y)
            y += 1
            return self.fc3(a + 0 * y)

    block, seen = found_in(randomized(Later()), vectors())["fc1"]
    assert block.reason == ""
    assert seen.outputs[0].unique().tolist() == [-1, 1]


class SideBranch(Plain):
    def forward(self, x):
        s = self.fc1(x)
        y = self.fc2(self.sign1(self.norm1(s)))
        return self.fc3(self.sign2(self.norm2(y + s)))


def test_addition_beside_the_way_to_the_sign_does_not_count():
    blocks = blocks_of(SideBranch(), vectors())
    assert blocks["fc1"].reason == ""
    assert "added" in blocks["fc2"].reason


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
        pytest.param({"norm": nn.BatchNorm1d(6, track_running_stats=False)}, "norm1 has no", id="no statistics"),
    ],
)
def test_what_moves_the_threshold_is_named(around, reason):
    block = blocks_of(Between(**around), vectors())["fc1"]
    assert reason in block.reason
    assert block.has_outputs == ("pool" not in reason)  # pooling over neurons leaves none of them


def test_a_batch_norm_in_train_mode_has_no_fixed_threshold():
    model = Between().eval()
    model.norm1.train()
    with torch.no_grad(), Trace(model) as trace:
        model(vectors())
    assert "does not use them" in find_blocks(trace, ["fc1"])["fc1"][0].reason


class Scaled(BinaryLinear):
    """Multiplies its result itself, so that a flip moves it by another step than 2."""

    def forward(self, x):
        return super().forward(x) * self.weight.abs().mean(1)


class Shifted(BinaryLinear):
    """Adds a bias itself, and turns channels to the front and back."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.shift = nn.Parameter(torch.ones(self.out_features))

    def forward(self, x):
        return (super().forward(x) + self.shift).t().contiguous().t()


def test_what_a_layer_does_with_its_own_result_counts():
    blocks = blocks_of(nn.Sequential(Scaled(6, 5), BinaryActivation(), Scaled(5, 3)), vectors())
    assert "mul changes it in the layer" in blocks["0"].reason
    assert "mul changes it in the layer" in blocks["2"].reason
    blocks = blocks_of(nn.Sequential(Shifted(6, 5), BinaryActivation(), Shifted(5, 3)), vectors())
    assert [block.reason for block in blocks.values()] == ["", ""]


def test_batch_norm_by_operations_is_not_known():
    norm = Function(lambda x: (x - x.new_ones(6)) / 2)
    assert "added" in blocks_of(Between(norm=norm), vectors())["fc1"].reason


def test_relu_network_has_no_binary_outputs():
    model = nn.Sequential(BinaryLinear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), BinaryLinear(5, 3))
    block = blocks_of(model, vectors())["0"]
    assert (block.has_outputs, block.last) == (False, False)
    assert "not binary" in block.reason


def test_layer_before_a_float_layer_is_not_the_last():
    block = blocks_of(nn.Sequential(BinaryLinear(6, 5), nn.ReLU(), nn.Linear(5, 3)), vectors())["0"]
    assert not block.last


def test_only_layers_before_the_last_hidden_one_have_surrogate_gradients():
    blocks = blocks_of(FC((6,), 3, widths=[5, 5, 5]), vectors())
    assert [block.surrogate for block in blocks.values()] == [True, True, False, False]


# where the neurons are


@pytest.mark.parametrize(
    ("layers", "shape", "axes"),
    [
        pytest.param([BinaryLinear(6, 5)], (6,), (Axis(1, 5), Axis(1, 5)), id="vectors"),
        pytest.param([BinaryLinear(6, 5)], (5, 6), (Axis(2, 5), Axis(2, 5)), id="tokens, as many as neurons"),
        pytest.param([BinaryConv2d(1, 4, 3)], (1, 6, 6), (Axis(1, 4), Axis(1, 4)), id="images"),
        pytest.param(
            [BinaryConv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten()],
            (1, 6, 6),
            (Axis(1, 4), Axis(1, 4)),
            id="flattened before the sign",
        ),
        pytest.param(
            [BinaryConv2d(1, 4, 3), Function(lambda x: x.permute(0, 2, 3, 1).flatten(1))],
            (1, 6, 6),
            (Axis(1, 4), Axis(1, 4, minor=True)),
            id="channels last and flattened",
        ),
        pytest.param(
            [BinaryLinear(6, 5), Function(lambda x: x.transpose(1, 2)), nn.BatchNorm1d(5)],
            (7, 6),
            (Axis(1, 5), Axis(1, 5)),
            id="tokens through a batch norm",
        ),
    ],
)
def test_the_dimension_of_neurons_is_followed(layers, shape, axes):
    model = nn.Sequential(*layers, BinaryActivation(), Function(lambda x: x.flatten(1)), nn.LazyLinear(3)).eval()
    inputs = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    model(inputs)
    route = blocks_of(model, inputs)["0"].route
    assert (route.before, route.after) == axes


def test_neurons_that_are_mixed_are_left_out():
    model = nn.Sequential(
        BinaryLinear(6, 4), Function(lambda x: x[:, [1, 0, 3, 2]]), BinaryActivation(), BinaryLinear(4, 3)
    )
    block = blocks_of(model, vectors())["0"]
    assert (block.has_outputs, block.reason) == (False, "its neurons are rearranged before they are binarized")


def test_numbers_that_are_read_for_a_log_change_nothing(randomized):
    class Logging(Plain):
        def forward(self, x):
            s = self.norm1(self.fc1(x))
            a = through(s)
            y = self.fc2(a)
            self.logged = s.mean().item(), a.mean().item(), y.mean().item(), y.sum().item()
            return self.fc3(self.sign2(self.norm2(y)))

    blocks = blocks_of(randomized(Logging()), vectors())
    assert [(block.reason, block.last, block.has_outputs) for block in blocks.values()] == [
        ("", False, True),
        ("", False, True),
        ("", True, False),
    ]
    assert blocks["fc1"].route.operations[-1] == "add"


class Head(nn.Module):
    """A binarized last layer, and what a network makes of its outputs."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.hidden, self.last, self.other = BinaryLinear(6, 16), BinaryLinear(16, 4, bias=True), nn.Linear(6, 4)
        self.norm, self.bias = nn.BatchNorm1d(4), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return self.function(self, self.last(binarize(self.hidden(x))), x)


KEPT = {
    "alone": lambda m, s, x: s,
    "scaled": lambda m, s, x: s * 0.25,
    "divided": lambda m, s, x: s / torch.tensor(8.0),
    "log softmax": lambda m, s, x: F.log_softmax(s, 1),
    "softmax": lambda m, s, x: s.softmax(1),
    "a constant added": lambda m, s, x: s + 3,
    "reshaped": lambda m, s, x: s.view(-1, 4, 1).squeeze(2),
    "beside others": lambda m, s, x: (s, m.other(x), s.sum()),
}
CHANGED = {
    "batch norm": lambda m, s, x: m.norm(s),
    "add": lambda m, s, x: s + m.bias,
    "neg": lambda m, s, x: -s,
    "mul": lambda m, s, x: s * torch.tensor([1.0, 2.0, 3.0, 0.5]),
    "clamp": lambda m, s, x: s.clamp(-1, 1),
    "sum": lambda m, s, x: s.view(-1, 2, 2).sum(-1),
    "tanh": lambda m, s, x: torch.tanh(s * 0.1),
}
CHANGED["add of another head"] = lambda m, s, x: s + m.other(x)


@pytest.mark.parametrize("function", KEPT.values(), ids=KEPT)
def test_outputs_of_a_last_layer_are_scores_if_their_distances_stay_in_proportion(function, randomized):
    block = blocks_of(randomized(Head(function)), vectors())["last"]
    assert (block.last, block.reason) == (True, "")


@pytest.mark.parametrize(("name", "function"), CHANGED.items(), ids=CHANGED)
def test_what_makes_other_scores_of_the_outputs_of_a_last_layer_is_named(name, function, randomized):
    block = blocks_of(randomized(Head(function)), vectors())["last"]
    assert block.last
    operation = name.replace(" of another head", "").replace(" ", "_")
    assert block.reason == f"{operation} makes other class scores of its outputs"


def test_what_is_computed_behind_the_network_does_not_count(randomized):
    """The loss of a step, say: it is outside of the outermost module that runs."""
    model = randomized(nn.Sequential(Head(KEPT["alone"]))).eval()
    with torch.no_grad(), Trace(model) as trace:
        scores = model[0](vectors())
        (1 - scores * F.one_hot(scores.argmax(1), 4)).clamp(min=0).mean()
    (block, _), _ = find_blocks(trace, ["0.last", "0.hidden"]).values()
    assert (block.last, block.reason) == (True, "")
