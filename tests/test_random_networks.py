"""Laws over random networks: what is binarized is found, flips and restores are exact, margins are the definition's."""

import copy
import math
from dataclasses import dataclass, field

import patterns
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Project, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnnft
from bnnft.ber import Independent, Key
from bnnft.callbacks import ToleranceMetrics
from bnnft.injection.injection import Injection, draw_flips
from bnnft.nn import BinaryActivation, BinaryConv2d, BinaryLinear

SIDE = 6


class HandWrittenConv(nn.Module):
    """A kernel scaled by the mean magnitude of each channel."""

    def __init__(self, channels, outputs):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outputs, channels, 3, 3))

    def forward(self, x):
        scale = self.kernel.abs().mean((1, 2, 3), keepdim=True).detach()
        return F.conv2d(x, patterns._Sign.apply(self.kernel) * scale, padding=1)


def own_conv(channels, outputs):
    return BinaryConv2d(channels, outputs, 3, padding=1, bias=False)


def float_conv(channels, outputs):
    return nn.Conv2d(channels, outputs, 3, padding=1)


def own_linear(inputs, outputs):
    return BinaryLinear(inputs, outputs, bias=False)


CONVOLUTIONS = {own_conv: "weight", HandWrittenConv: "kernel", float_conv: None}
LINEARS = {own_linear: "weight", nn.Linear: None, patterns.SignFunction: "weight", patterns.Transposed: "kernel"}
LINEARS |= {patterns.Flat: "weights"}


@dataclass
class Network:
    """A random network, with what is to be found in it."""

    parts: list = field(default_factory=list)
    binarized: list = field(default_factory=list)  # names of parameters
    neurons: dict = field(default_factory=dict)  # layer: (pooling, batch norm or None, activation) by their places

    def layer(self, layer, parameter):
        self.parts.append(layer)
        if parameter is not None:
            self.binarized.append(f"{len(self.parts) - 1}.{parameter}")


@st.composite
def networks(draw):
    """Convolutions, then linear maps, each with pooling, batch norm and activation or without."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    network, channels, side = Network(), 1, SIDE
    network.layer(own_conv(1, 8), "weight")  # one layer at least has all that a margin needs
    add_neurons(network, nn.BatchNorm2d(8), BinaryActivation())
    channels = 8
    for _ in range(draw(st.integers(0, 2))):
        kind = draw(st.sampled_from(list(CONVOLUTIONS)))
        network.layer(kind(channels, 8), CONVOLUTIONS[kind])
        pool = side > 3 and draw(st.booleans())
        side //= 2 if pool else 1
        draw_neurons(draw, network, nn.BatchNorm2d(8), pool)
    network.parts.append(nn.Flatten())
    width = channels * side * side
    for _ in range(draw(st.integers(0, 2))):
        kind = draw(st.sampled_from(list(LINEARS)))
        network.layer(kind(width, 12), LINEARS[kind])
        width = 12
        draw_neurons(draw, network, nn.BatchNorm1d(12), pool=False)
    kind = draw(st.sampled_from(list(LINEARS)))
    network.layer(kind(width, 3), LINEARS[kind])
    return network


def draw_neurons(draw, network, norm, pool):
    activation = draw(st.sampled_from([BinaryActivation, nn.ReLU]))()
    add_neurons(network, norm if draw(st.booleans()) else None, activation, pool, draw(st.booleans()))


def add_neurons(network, norm, activation, pool=False, dropout=False):
    layer = len(network.parts) - 1
    if pool:
        network.parts.append(nn.MaxPool2d(2))
    if norm is not None:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_(0, 2)
        norm.running_var.uniform_(1, 9)
        network.parts.append(norm)
    place = len(network.parts) - 1
    if dropout:
        network.parts.append(nn.Dropout(0.2))
    network.parts.append(activation)
    binarized = network.binarized and network.binarized[-1].split(".")[0] == str(layer)
    if binarized and isinstance(activation, BinaryActivation):
        network.neurons[layer] = (place, norm)  # what comes out there is before the threshold, or of the norm


def data():
    return torch.randn(5, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def watched(model, inputs, how):
    injection = Injection(model, how=how)
    with injection.finder:
        model(inputs)
    injection.learn()
    return injection


@given(networks())
@settings(max_examples=60)
def test_the_binarized_weights_are_found_and_no_others(network):
    """Fails with float layers among them, if two values are looked for with a tolerance of the order of weights."""
    model = nn.Sequential(*network.parts)
    assert list(bnnft.find_binarized_weights(model, data())) == network.binarized


@given(networks(), st.floats(0, 1), st.sampled_from(["auto", "latent"]))
@settings(max_examples=60)
def test_flips_are_exact_and_so_is_the_restore(network, rate, how):
    """The outputs are those of a copy whose latent signs were multiplied by -1; weights come back bit for bit.

    Fails if one drawn bit is left out, or one more is flipped.
    """
    model, x = nn.Sequential(*network.parts).eval(), data()
    injection = watched(model, x, how)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flips = draw_flips(injection.sites, Independent(rate), Key(1))
    slow = copy.deepcopy(model)
    for name, indices in flips.items():
        weight = slow.get_parameter(name)
        with torch.no_grad():
            for index in indices.tolist():
                weight.view(-1)[index] *= -1
    with injection.under(flips, Independent(rate), Key(1)):
        seen = model(x)
    assert torch.allclose(seen, slow(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def slow_margin(network, layer, inputs):
    """The mean distance to the threshold in units of what the layer's values are multiplied with, in plain loops."""
    place, norm = network.neurons[layer]
    model = nn.Sequential(*network.parts).eval()
    with torch.no_grad():
        values = model[: place + (norm is None)](inputs)  # what the norm is given, or what there is without one
        weight = next(model[layer].parameters())
    scales = [1.0] * values.shape[1]
    if isinstance(model[layer], HandWrittenConv | patterns.Flat):
        scales = weight.detach().reshape(values.shape[1], -1).abs().mean(1).tolist()
    distances = []
    for sample in values.tolist():
        for neuron, outputs in enumerate(sample):
            threshold = 0.0
            if norm is not None:
                mean, variance = norm.running_mean[neuron].item(), norm.running_var[neuron].item()
                gamma, beta = norm.weight[neuron].item(), norm.bias[neuron].item()
                threshold = mean - beta * math.sqrt(variance + norm.eps) / gamma
            flat = torch.tensor(outputs).reshape(-1).tolist()
            distances += [abs(value - threshold) / scales[neuron] for value in flat]
    return sum(distances) / len(distances)


@pytest.mark.filterwarnings("ignore:ToleranceMetrics")
@given(networks())
@settings(max_examples=20)
def test_margins_are_those_of_a_slow_reference(tmp_path_factory, network):
    """For every layer with binary neurons, in units of its scale, and for no other."""
    module = Project(nn.Sequential(*network.parts))
    run = trainer(tmp_path_factory.mktemp("run"), [ToleranceMetrics()])
    batches = DataLoader(TensorDataset(data(), torch.arange(5) % 3), batch_size=5)
    run.validate(module, batches, verbose=False)
    found = {
        name.split("/")[2]: float(value)
        for name, value in run.callback_metrics.items()
        if name.startswith("val/margin/")
    }
    assert found.keys() == {str(layer) for layer in network.neurons}
    for layer, margin in found.items():
        assert margin == pytest.approx(slow_margin(network, int(layer), data()), rel=1e-3)
