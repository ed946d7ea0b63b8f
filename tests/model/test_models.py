import pytest
import torch
from torch import nn

import bnnft
from bnnft.model import FC, VGG3

NETWORKS = [FC((1, 8, 8), 10, widths=[16, 8]), FC((5,), 3, widths=[]), VGG3((3, 12, 8), 4, channels=4, width=16)]


@pytest.mark.parametrize("network", NETWORKS)
def test_every_linear_and_convolution_is_binarized(network):
    weights = {id(weight) for weight in bnnft.binarized_weights(network).values()}
    layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert layers
    assert {id(layer.weight) for layer in layers} == weights
    assert all(layer.bias is None for layer in layers)


@pytest.mark.parametrize(
    ("network", "shape", "classes"),
    list(zip(NETWORKS, [(1, 8, 8), (5,), (3, 12, 8)], [10, 3, 4], strict=True)),
)
def test_scores_have_one_column_a_class_and_a_gradient_for_every_weight(network, shape, classes):
    scores = network(torch.randn(6, *shape))
    assert scores.shape == (6, classes)
    scores.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_vgg3_pools_before_batch_norm():
    names = [name for name, _ in VGG3((1, 28, 28), 10).named_children()]
    assert names[:4] == ["conv1", "pool1", "norm1", "sign1"]


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: FC((1, 8, 8), 10, widths=[0]), "widths must be at least 1"),
        (lambda: VGG3((784,), 10), "input_shape must be"),
        (lambda: VGG3((1, 3, 28), 10), "at least 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(build, says):
    with pytest.raises(ValueError, match=says):
        build()
