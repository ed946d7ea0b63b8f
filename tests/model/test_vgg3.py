import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnnft
from bnnft.model import VGG3


def hidden(values, norm):
    values = F.batch_norm(values, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return torch.where(values >= 0, 1.0, -1.0)


@pytest.mark.parametrize("shape", [(3, 12, 8), (1, 4, 4), (2, 7, 5)])
def test_convolutions_pool_before_batch_norm_and_sign(shape, randomized):
    model = VGG3(shape, 4, channels=5, width=16)
    assert model.scale(torch.tensor(1.0)).item() == pytest.approx(1 / math.sqrt(16))
    randomized(model)
    values = x = torch.randn(6, *shape, generator=torch.Generator().manual_seed(0))
    for conv, norm in ((model.conv1, model.norm1), (model.conv2, model.norm2)):
        values = hidden(F.max_pool2d(F.conv2d(values, conv.weight.sign(), padding=1), 2), norm)
    values = hidden(F.linear(values.flatten(1), model.fc1.weight.sign()), model.norm3)
    torch.testing.assert_close(model(x), F.linear(values, model.fc2.weight.sign()) / math.sqrt(16))


def test_every_weight_is_binarized_and_trained_and_no_layer_has_a_bias():
    network = VGG3((3, 12, 8), 4, channels=4, width=16)
    weights = {id(weight) for weight in bnnft.binarized_weights(network).values()}
    layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert {id(layer.weight) for layer in layers} == weights
    assert len(weights) == len(layers) == 4
    assert all(layer.bias is None for layer in layers)
    network(torch.randn(6, 3, 12, 8)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_sizes_are_those_of_the_paper_unless_told_otherwise():
    network = VGG3((1, 28, 28), 10)
    assert (network.conv1.out_channels, network.conv2.out_channels, network.fc1.out_features) == (64, 64, 2048)


@pytest.mark.parametrize("shape", [(784,), (3, 28), (1, 3, 28), (1, 28, 3), (0, 8, 8), (1, 1, 8, 8)], ids=str)
def test_other_input_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"input_shape must be \(channels, height, width\) with .* got"):
        VGG3(shape, 10)


@pytest.mark.parametrize("size", ["num_classes", "channels", "width"])
def test_sizes_below_1_are_refused(size):
    with pytest.raises(ValueError, match="num_classes, channels and width must be at least 1, got"):
        VGG3(**{"input_shape": (1, 8, 8), "num_classes": 10, "channels": 4, "width": 4, size: 0})
