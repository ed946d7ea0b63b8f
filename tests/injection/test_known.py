import pytest
import torch
from torch import nn

from bnnft.injection.known import flips_by_itself, known_weights
from bnnft.nn import BinaryConv2d, BinaryLinear


class Negated(BinaryLinear):
    def forward(self, x):
        return -super().forward(x)


@pytest.mark.parametrize("layer", [BinaryLinear(4, 3), BinaryConv2d(2, 3, 3)], ids=lambda layer: type(layer).__name__)
def test_our_layers_flip_the_bits_that_they_make(layer):
    (known,) = known_weights(nn.Sequential(nn.Linear(4, 4), layer))
    assert known == ("1.weight", layer.weight, None, "layer")


def test_a_subclass_with_a_forward_of_its_own_is_known_and_flipped_where_its_bits_are_made():
    layer = Negated(4, 3)
    assert not flips_by_itself(layer)
    (known,) = known_weights(layer)
    assert (known.name, known.where) == ("weight", "made")


def test_a_tied_weight_is_there_under_each_of_its_names():
    first, second = BinaryLinear(4, 4), BinaryLinear(4, 4)
    second.weight = first.weight
    assert [each.name for each in known_weights(nn.ModuleList([first, second]))] == ["0.weight", "1.weight"]


def test_a_weight_that_is_no_parameter_is_not_one():
    layer = BinaryLinear(4, 3)
    del layer.weight
    layer.weight = torch.ones(3, 4)
    assert known_weights(layer) == []
