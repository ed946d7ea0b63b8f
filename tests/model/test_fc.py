import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnnft
from bnnft.model import FC


@pytest.mark.parametrize("widths", [[], [6], [6, 5], (6, 5, 4)], ids=str)
def test_layers_are_binary_linear_norm_and_sign_and_a_scale_by_the_last_width(widths, randomized):
    model = FC((2, 3), 4, widths=widths)
    assert model.scale(torch.tensor(1.0)).item() == pytest.approx(1 / math.sqrt([6, *widths][-1]))
    randomized(model)
    values = x = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0))
    values, parts = values.flatten(1), dict(model.named_children())
    for number in range(1, len(widths) + 1):
        norm = parts[f"norm{number}"]
        values = F.linear(values, parts[f"fc{number}"].weight.sign())
        values = F.batch_norm(values, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        values = torch.where(values >= 0, 1.0, -1.0)
    scores = F.linear(values, parts[f"fc{len(widths) + 1}"].weight.sign())
    torch.testing.assert_close(model(x), scores * model.scale(torch.tensor(1.0)))


@pytest.mark.parametrize("network", [FC((1, 8, 8), 10, widths=[16, 8]), FC((5,), 3, widths=[])])
def test_every_weight_is_binarized_and_trained_and_no_layer_has_a_bias(network):
    weights = {id(weight) for weight in bnnft.binarized_weights(network).values()}
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    assert {id(layer.weight) for layer in layers} == weights
    assert len(weights) == len(layers) > 0
    assert all(layer.bias is None for layer in layers)
    network(torch.randn(6, layers[0].in_features)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_hidden_layers_are_two_of_1024_unless_told_otherwise():
    assert [layer.out_features for layer in FC((4,), 2) if isinstance(layer, nn.Linear)] == [1024, 1024, 2]


@pytest.mark.parametrize("sizes", [{"input_shape": (1, 0)}, {"num_classes": 0}, {"widths": [4, 0]}], ids=str)
def test_sizes_below_1_are_refused(sizes):
    with pytest.raises(ValueError, match="input_shape, num_classes and widths must be at least 1, got"):
        FC(**{"input_shape": (1, 8, 8), "num_classes": 10, "widths": [4], **sizes})


def test_sizes_of_1_are_allowed():
    assert FC((1,), 1, widths=[1]).eval()(torch.ones(2, 1)).shape == (2, 1)
