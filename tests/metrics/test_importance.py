import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from bnnft.injection.sites import find_sites
from bnnft.metrics import ImportanceVariance, neuron_importance
from bnnft.metrics.importance import measured_importance
from bnnft.model import FC, VGG3
from bnnft.nn import BinaryActivation, BinaryConv2d, BinaryLinear, binarize
from bnnft.tracing.blocks import Block, find_blocks
from bnnft.tracing.trace import Trace

SAMPLES, CLASSES = 5, 3


def conv_then_linear():
    """Return a convolution whose binary outputs go straight into the output layer."""
    hidden = BinaryConv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), BinaryActivation()
    return nn.Sequential(*hidden, nn.Flatten(), BinaryLinear(4 * 64, CLASSES, bias=False))


NETWORKS = {
    "fc": lambda: FC((1, 8, 8), CLASSES, widths=[6, 5]),
    "vgg3": lambda: VGG3((1, 8, 8), CLASSES, channels=4, width=6),
    "conv": conv_then_linear,
}


def batch(samples=SAMPLES):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, 1, 8, 8, generator=generator, dtype=torch.float64)
    return inputs, torch.arange(samples) % CLASSES


def blocks_of(model, inputs=None):
    with torch.no_grad(), Trace(model) as trace:
        model(batch()[0] if inputs is None else inputs)
    found = find_blocks(trace, [site.layer for site in find_sites(model)])
    return {layer: block for layer, (block, _) in found.items() if block.has_outputs}


@pytest.fixture(params=NETWORKS)
def network(request, randomized):
    """A sequential network in double precision, and the blocks of its hidden layers."""
    model = randomized(NETWORKS[request.param]()).double()
    return model, blocks_of(model)


def split(model, layer):
    """Return the sequential network up to a layer's outputs, and the rest."""
    names, layers = zip(*model.named_children(), strict=True)
    signs = (place for place, part in enumerate(layers) if isinstance(part, BinaryActivation))
    place = next(place for place in signs if place > names.index(layer)) + 1
    return nn.Sequential(*layers[:place]), nn.Sequential(*layers[place:])


def cross_entropies(model):
    inputs, targets = batch()
    return lambda: F.cross_entropy(model(inputs), targets, reduction="none")


def slow_change(model, layer, factor):
    """Return |L(factor a_j) - L(a_j)|, by running the rest of the network again for each sample and neuron."""
    head, tail = split(model, layer)
    rows = []
    for x, y in zip(*batch(), strict=True):
        outputs = head(x[None])
        clean = F.cross_entropy(tail(outputs), y[None])
        row = []
        for neuron in range(outputs.shape[1]):
            changed = outputs.clone()
            changed[0, neuron] = factor * changed[0, neuron]
            row.append((F.cross_entropy(tail(changed), y[None]) - clean).abs())
        rows.append(torch.stack(row))
    return torch.stack(rows).detach()


def slow_gradient(model, layer):
    """Return |sum over positions of 2 a dL/da|, one backward for each sample alone."""
    head, tail = split(model, layer)
    rows = []
    for x, y in zip(*batch(), strict=True):
        outputs = head(x[None]).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(tail(outputs), y[None]), outputs)
        effects = (2 * outputs * gradient)[0].reshape(outputs.shape[1], -1).tolist()
        rows.append([abs(math.fsum(positions)) for positions in effects])
    return torch.tensor(rows).double()


@pytest.mark.parametrize(("estimator", "factor"), [("flip", -1), ("ablation", 0)])
def test_flip_and_ablation_are_the_change_of_loss_when_the_network_runs_again(network, estimator, factor):
    model, blocks = network
    importance = neuron_importance(model, blocks, cross_entropies(model), estimator)
    assert importance.keys() == blocks.keys()
    for layer in blocks:
        assert_close(importance[layer], slow_change(model, layer, factor))
        assert importance[layer].any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_is_the_first_order_effect_of_each_sample_alone(network, reduction):
    model, blocks = network
    inputs, targets = batch()
    importance = neuron_importance(model, blocks, lambda: F.cross_entropy(model(inputs), targets, reduction=reduction))
    for layer in blocks:
        assert_close(importance[layer], slow_gradient(model, layer), rtol=1e-5, atol=1e-8)
        assert importance[layer].any()


@pytest.mark.parametrize("name", ["fc", "conv"])
def test_gradient_is_flip_where_the_loss_is_linear_in_the_outputs(name, randomized):
    model = randomized(NETWORKS[name]()).double()
    layer, block = list(blocks_of(model).items())[-1]
    inputs, targets = batch()

    def loss():
        return -model(inputs).gather(1, targets[:, None]).squeeze(1)

    gradient, flip = (neuron_importance(model, {layer: block}, loss, way)[layer] for way in ("gradient", "flip"))
    assert_close(gradient, flip)
    assert flip.any()


def test_neuron_that_the_loss_does_not_see_has_no_importance(randomized):
    model = randomized(NETWORKS["fc"]()).double()
    blocks = blocks_of(model)
    for estimator in ("gradient", "flip", "ablation"):
        importance = neuron_importance(
            model, blocks, lambda: batch()[0].sum((1, 2, 3)) + 0 * model(batch()[0])[:, 0], estimator
        )
        assert not any(values.any() for values in importance.values())


def test_layers_that_share_an_activation_are_changed_one_at_a_time(randomized):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = BinaryLinear(64, 6, bias=False), BinaryLinear(6, 5, bias=False)
            self.norm1, self.norm2, self.out = nn.BatchNorm1d(6), nn.BatchNorm1d(5), BinaryLinear(5, CLASSES)
            self.sign = BinaryActivation()

        def forward(self, x):
            return self.out(self.sign(self.norm2(self.fc2(self.sign(self.norm1(self.fc1(x.flatten(1))))))))

    shared = randomized(Shared()).double()
    alone = nn.Sequential(nn.Flatten(), shared.fc1, shared.norm1, BinaryActivation(), shared.fc2, shared.norm2)
    alone.extend([BinaryActivation(), shared.out])
    for estimator in ("gradient", "flip"):
        got = neuron_importance(shared, blocks_of(shared), cross_entropies(shared), estimator)
        expected = neuron_importance(alone, blocks_of(alone), cross_entropies(alone), estimator)
        assert_close(list(got.values()), list(expected.values()))


def test_gradient_of_a_layer_that_runs_twice_counts_both_outputs_as_flip_does(randomized):
    class Twice(nn.Module):
        """The loss is linear in both outputs of the layer, and the second does not depend on the first."""

        def __init__(self):
            super().__init__()
            self.fc, self.norm, self.sign = BinaryLinear(32, 6, bias=False), nn.BatchNorm1d(6), BinaryActivation()
            self.out = BinaryLinear(6, CLASSES, bias=False)

        def forward(self, x):
            first, second = x.flatten(1).chunk(2, dim=1)
            return self.out(self.sign(self.norm(self.fc(first))) + 2 * self.sign(self.norm(self.fc(second))))

    model = randomized(Twice()).double()
    blocks, inputs = blocks_of(model), batch()[0]
    gradient, flip = (
        neuron_importance(model, blocks, lambda: model(inputs)[:, 0], way) for way in ("gradient", "flip")
    )
    assert_close(gradient, flip)


@pytest.mark.parametrize(
    ("layers", "shape", "neurons"),
    [
        pytest.param([BinaryLinear(8, 6), BinaryActivation(), BinaryLinear(6, 3)], (7, 8), 6, id="features last"),
        pytest.param(
            [BinaryConv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), BinaryActivation(), BinaryLinear(4 * 36, 3)],
            (1, 8, 8),
            4,
            id="flattened before the sign",
        ),
    ],
)
@pytest.mark.parametrize("estimator", ["gradient", "flip"])
def test_importance_is_of_neurons_wherever_their_dimension_is(layers, shape, neurons, estimator, randomized):
    model = randomized(nn.Sequential(*layers))
    inputs = torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(0))
    blocks = {"0": blocks_of(model, inputs)["0"]}
    importance = neuron_importance(model, blocks, lambda: model(inputs).flatten(1).sum(1), estimator)
    assert importance["0"].shape == (SAMPLES, neurons)


@pytest.mark.parametrize("estimator", ["gradient", "flip", "ablation"])
def test_measuring_leaves_no_trace(estimator, randomized):
    """Outputs, hooks, gradients, buffers and the global random stream are as before, also when the loss raises."""
    model = randomized(NETWORKS["fc"]()).double()
    blocks, inputs = blocks_of(model), batch()[0]
    outputs, state = model(inputs), {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    with torch.no_grad():
        neuron_importance(model, blocks, cross_entropies(model), estimator)
    runs = []

    def fails():
        runs.append(model(inputs))
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        neuron_importance(model, blocks, fails, estimator)
    assert len(runs) == 1
    assert torch.equal(model(inputs), outputs)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("estimator", ["gradient", "flip", "ablation"])
def test_loss_of_a_wrong_shape_raises(estimator, randomized):
    model = randomized(NETWORKS["fc"]()).double()
    with pytest.raises(ValueError, match=r"one value a|one a sample"):
        neuron_importance(model, blocks_of(model), lambda: model(batch()[0]), estimator)


@pytest.mark.parametrize("estimator", ["flip", "ablation"])
def test_mean_loss_is_refused_where_the_loss_of_each_sample_is_needed(estimator, randomized):
    model = randomized(NETWORKS["fc"]()).double()
    with pytest.raises(ValueError, match="one value a sample"):
        neuron_importance(model, blocks_of(model), lambda: cross_entropies(model)().mean(), estimator)


def test_unknown_estimator_raises():
    with pytest.raises(ValueError, match="estimator must be one of gradient, flip, ablation, got 'shapley'"):
        neuron_importance(nn.Identity(), {"layer": Block("layer")}, lambda: torch.zeros(1), "shapley")
    with pytest.raises(ValueError, match="estimator must be one of"):
        ImportanceVariance("shapley")


# neurons that no module returns, and the slow reference


class _Two(torch.autograd.Function):
    """Sign and a scale in one function, as BinaryNet and its kin write it."""

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
    "binarize": lambda x: binarize(x, 1.0),
    "sign without gradient": torch.sign,
    "straight-through": lambda x: x + (torch.where(x >= 0, 1.0, -1.0) - x).detach(),
    "clipped straight-through": through,
    "two operations in a function": _Two.apply,
}


class Inline(nn.Module):
    """A convolution and two linear layers with all norms and signs in one forward."""

    def __init__(self, sign):
        super().__init__()
        self.conv, self.norm1 = BinaryConv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.fc1, self.norm2 = BinaryLinear(4 * 9, 6, bias=False), nn.BatchNorm1d(6)
        self.fc2, self.sign = BinaryLinear(6, CLASSES, bias=False), sign

    def head(self, x):
        return self.sign(F.max_pool2d(self.norm1(self.conv(x)), 2))

    def middle(self, a):
        return self.sign(self.norm2(self.fc1(a.flatten(1))))

    def forward(self, x):
        return self.fc2(self.middle(self.head(x)))


def slow(model, layer, change):
    """What a function makes of each sample's loss and neuron outputs, given one sample after the other."""
    rows = []
    for x, y in zip(*batch(), strict=True):
        a = model.head(x[None]).detach()
        tail = (lambda a: model.fc2(model.middle(a))) if layer == "conv" else model.fc2
        a = a if layer == "conv" else model.middle(a).detach()
        rows.append(change(a, lambda a, tail=tail, y=y: F.cross_entropy(tail(a), y[None])))
    return torch.stack(rows).detach()


def slow_flip(a, loss):
    clean, changes = loss(a), []
    for neuron in range(a.shape[1]):
        flipped = a.clone()
        flipped[:, neuron] *= -1
        changes.append((loss(flipped) - clean).abs())
    return torch.stack(changes)


def slow_slope(a, loss):
    a = a.requires_grad_()
    return (2 * a * torch.autograd.grad(loss(a), a)[0])[0].reshape(a.shape[1], -1).sum(1).abs()


@pytest.mark.parametrize("sign", SIGNS.values(), ids=SIGNS.keys())
@pytest.mark.parametrize(("estimator", "reference"), [("flip", slow_flip), ("gradient", slow_slope)])
@pytest.mark.parametrize("frozen", [False, True])
def test_importance_of_neurons_in_a_forward_of_many_operations_is_that_of_a_slow_reference(
    sign, estimator, reference, frozen, randomized
):
    model = randomized(Inline(sign)).double().requires_grad_(not frozen)
    importance = neuron_importance(model, blocks_of(model), cross_entropies(model), estimator)
    assert importance.keys() == {"conv", "fc1"}
    for layer, values in importance.items():
        assert_close(values, slow(model, layer, reference), rtol=1e-5, atol=1e-8)
    assert importance["fc1"].any()


# exact and quick


def counted(model, *counters):
    """Run the exact estimator, and return the importance and how often the counters ran."""
    runs = [0 for _ in counters]

    def count(number, module, args):
        runs[number] += 1

    handles = [c.register_forward_pre_hook(lambda m, a, n=n: count(n, m, a)) for n, c in enumerate(counters)]
    importance = neuron_importance(model, blocks_of(model), cross_entropies(model), "flip")
    for handle in handles:
        handle.remove()
    return importance, runs


def test_only_what_follows_the_neurons_runs_again(randomized):
    model = randomized(FC((1, 8, 8), CLASSES, widths=[60, 50])).double()
    importance, (runs,) = counted(model, model.fc1)
    assert {layer: values.shape[1] for layer, values in importance.items()} == {"fc1": 60, "fc2": 50}
    assert runs <= 1 + 2 * 3  # to find the blocks, then for each layer once, and at most twice to compare


def reading(x):
    return x * 2 if x.sum() > 0 else x


def leaving(x):
    return torch.from_numpy(x.detach().numpy() * 2)


@pytest.mark.parametrize("between", [reading, leaving])
def test_the_whole_runs_again_where_the_end_alone_would_not_be_exact(between, randomized):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = BinaryLinear(64, 6, bias=False), BinaryLinear(6, CLASSES, bias=False)

        def forward(self, x):
            return self.fc2(between(binarize(self.fc1(x.flatten(1)))))

    model = randomized(Branching()).double()
    importance, (runs,) = counted(model, model.fc1)
    a = binarize(model.fc1(batch()[0].flatten(1))).detach()
    clean = F.cross_entropy(model.fc2(between(a)), batch()[1], reduction="none")
    for neuron in range(6):
        flipped = a.clone()
        flipped[:, neuron] *= -1
        loss = F.cross_entropy(model.fc2(between(flipped)), batch()[1], reduction="none")
        assert_close(importance["fc1"][:, neuron], (loss - clean).abs().detach())
    assert runs >= 6


# what a loss changes in the model


class Keeping(nn.Module):
    """Moves a buffer, a list and a batch norm's statistics in every forward, and makes use of what it moves."""

    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.fc2 = BinaryLinear(64, 6), nn.BatchNorm1d(6), BinaryLinear(6, CLASSES)
        self.register_buffer("ema", torch.zeros(6))
        self.seen = []

    def forward(self, x):
        h = self.norm(self.fc1(x.flatten(1)))
        with torch.no_grad():
            self.ema.lerp_(h.mean(0), 0.5)
            self.seen.append(len(x))
        return self.fc2(binarize(h)) + self.ema.sum() * len(self.seen)


@pytest.mark.parametrize("estimator", ["gradient", "flip", "ablation"])
@pytest.mark.parametrize("training", [False, True])
def test_what_the_loss_changes_is_put_back_between_and_after(estimator, training, randomized):
    model = randomized(Keeping()).double()
    blocks = blocks_of(model)
    model.norm.train(training)
    model.seen = [1, 2]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first = neuron_importance(model, blocks, cross_entropies(model), estimator)["fc1"]
    assert model.seen == [1, 2]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(first, neuron_importance(model, blocks, cross_entropies(model), estimator)["fc1"])
    assert first.any()


def test_what_cannot_be_put_back_is_named(randomized):
    model = randomized(NETWORKS["fc"]()).double()
    model.numbers = iter(range(10**6))
    blocks, losses = blocks_of(model), cross_entropies(model)

    def loss():
        next(model.numbers)
        return losses()

    for estimator in ("gradient", "flip"):
        assert set(measured_importance(model, blocks, loss, estimator).moved) == {"numbers"}


def test_layers_that_have_no_gradient_leave_the_others_alone(randomized):
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.fc3 = BinaryLinear(64, 6), BinaryLinear(64, 6), BinaryLinear(6, CLASSES)

        def forward(self, x):
            x = x.flatten(1)
            return self.fc3(binarize(self.fc1(x)).detach() + binarize(self.fc2(x)))

    model = randomized(Cut()).double()
    result = measured_importance(model, blocks_of(model), cross_entropies(model), "gradient")
    assert result.values.keys() == {"fc2"}
    assert result.reasons == {"fc1": "the loss does not depend on its neuron outputs by any gradient"}
    with pytest.raises(ValueError, match="fc1: the loss does not depend"):
        neuron_importance(model, blocks_of(model), cross_entropies(model))
