"""What is found in one forward: layers whose sums can be corrected, and the batch norms behind them."""

import patterns
import pytest
import torch
import torch.nn.functional as F
from binarizers import ste
from networks import small_net
from torch import nn

from bnnft import flipped
from bnnft.compensation.plan import Planner
from bnnft.model import VGG3
from bnnft.nn import BinaryActivation, BinaryLinear


def planned(model, *inputs):
    planner = Planner(model.eval())
    with planner, torch.no_grad():
        model(*inputs)
    return planner.plan()


class Functional(nn.Module):
    """No modules but one: weights, statistics and signs by functions."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))
        self.mean, self.variance = (nn.Buffer(value) for value in (torch.zeros(8), torch.ones(8)))

    def forward(self, x):
        return ste(F.batch_norm(F.linear(x, ste(self.weight)), self.mean, self.variance))


@pytest.mark.parametrize("flips", [0, 0.2])
def test_layers_and_norms_of_a_network(flips):
    model = small_net()
    with flipped(model, flips):
        plan = planned(model, torch.randn(4, 12))
    assert [(layer.name, layer.norm, layer.last, layer.doubt) for layer in plan.layers] == [
        ("0", "1", False, ""),
        ("3", "4", False, ""),
        ("6", "", True, ""),
    ]
    assert plan.norms == ("1", "4")
    assert (plan.left_out, plan.unfixed) == ({}, {})


def test_where_scaling_does_not_help_is_known():
    plan = planned(VGG3((1, 8, 8), 3, channels=4, width=16), torch.randn(2, 1, 8, 8))
    doubts = {layer.name: layer.doubt for layer in plan.layers}
    assert doubts["conv1"] == doubts["conv2"] == "max-pooling takes the largest of noisy sums"
    assert doubts["fc1"] == doubts["fc2"] == ""
    assert plan.norms == ("norm1", "norm2", "norm3")


def test_batch_norms_without_fixed_statistics_are_named():
    model = nn.Sequential(
        BinaryLinear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), BinaryActivation(), BinaryLinear(8, 2)
    )
    plan = planned(model, torch.randn(4, 6))
    assert plan.unfixed == {"0": "1"}
    assert plan.norms == ()


def test_layers_of_others_are_found_and_what_has_no_sums_of_two_values_is_left_out_with_a_reason():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            return torch.bilinear(x, x, ste(self.weight)[None], None)

    torch.manual_seed(0)
    plan = planned(nn.Sequential(patterns.Centred(12, 6), nn.Tanh(), Shared()), torch.randn(4, 12))
    assert [layer.name for layer in plan.layers] == ["0"]
    assert list(plan.left_out) == ["2.weight"]
    assert "2 uses it otherwise than as the weight of linear" in plan.left_out["2.weight"]


def test_functions_without_modules_are_found_too():
    plan = planned(Functional(), torch.randn(4, 6))
    assert [layer.site.name for layer in plan.layers] == ["weight"]
    assert plan.norms == ()  # no module has these statistics: they can't be gathered anew
