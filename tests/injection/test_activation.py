import pytest
import torch
from torch import nn

from bnnft.ber import Asymmetric, Chip, Independent, Key
from bnnft.injection.activation import ActivationFlips, checked_target, find_activations
from bnnft.nn import BinaryActivation, BinaryLinear


class ZeroOrOne(nn.Module):
    def forward(self, x):
        return (x > 0).float()


class Pair(nn.Module):
    def forward(self, x):
        return x.sign(), x


def flips(layer, values, errors, key=None):
    """What a module puts out under errors, alone in a network."""
    model = nn.Sequential(layer)
    with ActivationFlips(model, ["0"], errors, key or Key(), exact=False):
        output = model(values)
    assert not layer._forward_hooks
    return output


X = torch.tensor([-1.0, 2.0, -0.0, 0.5])


@pytest.mark.parametrize("layer", [BinaryActivation(), ZeroOrOne()], ids=["signs", "zero or one"])
def test_the_two_values_are_exchanged_at_the_drawn_places(layer):
    values = torch.randn(50, 20)
    clean, wrong = layer(values), flips(layer, values, Independent(0.3), Key(4))
    drawn = Independent(0.3).flips(values, Key(4).at(1))
    assert (clean != wrong).flatten().nonzero().squeeze(1).tolist() == drawn.tolist()
    assert set(wrong.flatten().tolist()) == set(clean.flatten().tolist())


@pytest.mark.parametrize(("errors", "expected"), [(Asymmetric(1, 0), [1, 1, 1, 1]), (Asymmetric(0, 1), [0, 0, 0, 0])])
def test_the_higher_value_is_the_stored_one(errors, expected):
    assert flips(ZeroOrOne(), X, errors).tolist() == expected


def test_a_single_value_is_taken_for_a_sign():
    assert flips(BinaryActivation(), torch.ones(3), Independent(1.0)).tolist() == [-1, -1, -1]


def test_cells_of_activations_are_not_those_of_weights():
    """Positions of modules come after those of all parameters: one weight, then network, layer and activation."""
    model, errors = nn.Sequential(BinaryLinear(8, 100, bias=False), BinaryActivation()), Chip(0.2, chip=3)
    x = torch.randn(64, 8)
    clean = model(x)
    with ActivationFlips(model, ["1"], errors, Key(5), exact=False):
        wrong, again = model(x), model(x)
    assert torch.equal(wrong, again)
    expected = errors.flips(clean.detach(), Key(position=1 + 2))
    assert (clean != wrong).flatten().nonzero().squeeze(1).tolist() == expected.tolist()


def test_an_empty_batch_passes():
    assert flips(BinaryActivation(), torch.empty(0, 3), Independent(0.5)).shape == (0, 3)


@pytest.mark.parametrize(
    ("layer", "error", "says"),
    [
        (nn.Identity(), ValueError, "the output of '0' is not binary: it has more than two values"),
        (Pair(), TypeError, "'0' puts out a tuple and no plain tensor"),
    ],
)
def test_what_is_not_binary_is_refused_by_name(layer, error, says):
    with pytest.raises(error, match=says):
        flips(layer, X, Independent(0.5))
    assert not layer._forward_hooks


def test_known_activations_are_found_and_patterns_select_others():
    model = nn.ModuleDict({"a": BinaryActivation(), "b": nn.Sequential(ZeroOrOne(), BinaryActivation())})
    assert find_activations(model) == ["a", "b.1"]
    assert find_activations(model, ["b.*"]) == ["b.0", "b.1"]


def test_named_activations_without_the_target_are_an_error():
    with pytest.raises(ValueError, match=r"activations are flipped with target='activations' or 'both', got \['a'\]"):
        checked_target("weights", ["a"])
    checked_target("weights", None)
    checked_target("both", ["a"])
