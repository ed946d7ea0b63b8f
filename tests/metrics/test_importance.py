import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from bnnft.injection.sites import find_sites
from bnnft.metrics import ImportanceVariance, neuron_importance
from bnnft.model import FC, VGG3
from bnnft.nn import BinaryActivation, BinaryConv2d, BinaryLinear
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
