import pytest
import torch
from patterns import Centred
from torch import nn

from bnnft.ber import Chip, Independent, Key
from bnnft.evaluation.maps import FaultMaps, Flipping, checked_maps
from bnnft.nn import BinaryActivation, BinaryLinear


def network():
    torch.manual_seed(0)
    return nn.Sequential(BinaryLinear(64, 32, bias=False), BinaryActivation(), BinaryLinear(32, 4, bias=False)).eval()


X = torch.ones(2, 64)


def maps_of(models, maps=2, **options):
    model = network()
    found = FaultMaps(model, models, maps, Flipping(**options))
    found.clean(lambda: run(model))
    return model, found, found.runs


@torch.no_grad()
def run(model):
    return model(X)


def test_a_map_is_drawn_once_and_is_that_of_its_number():
    _, found, _ = maps_of([Independent(0.2)], maps=3, seed=3)
    for number, flips in enumerate(found.flips[0]):
        for position, (name, size) in enumerate((("0.weight", (32, 64)), ("2.weight", (4, 32)))):
            expected = Independent(0.2).flips(torch.ones(size), Key(3, number).at(position, name))
            assert torch.equal(flips[name], expected)
            assert len(expected)


def test_a_run_is_the_network_with_those_bits_flipped_and_all_are_restored():
    model, found, runs = maps_of([Independent(0.2)])
    before = [weight.detach().clone() for weight in model.parameters()]
    for each in runs[1:]:
        flips = found.flips[0][each.map[1]]
        signs = [torch.where(weight >= 0, 1.0, -1.0) for weight in before]
        for sign, name in zip(signs, ("0.weight", "2.weight"), strict=True):
            sign.view(-1)[flips[name]] *= -1
        expected = torch.where(X @ signs[0].T >= 0, 1.0, -1.0) @ signs[1].T
        assert torch.equal(found.under(each, 0, lambda: run(model)), expected)
        assert not torch.equal(run(model), expected)
        assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_bits_of_a_layer_that_nobody_knows_are_flipped_where_they_are_made():
    """Its latent signs are not its bits: flips of those would miss some and make others."""
    torch.manual_seed(0)
    model = nn.Sequential(Centred(64, 8))
    found = FaultMaps(model, [Independent(0.2)], 1, Flipping())
    found.clean(lambda: model(X))
    _, each = found.runs
    weight = model[0].weight.detach()
    bits = (weight - weight.mean(1, keepdim=True)).sign()
    assert not torch.equal(bits, weight.sign())
    bits.view(-1)[found.flips[0][0]["0.weight"]] *= -1
    assert torch.equal(found.under(each, 0, lambda: run(model)), X @ bits.T)


def test_runs_stand_for_all_maps_that_are_equal():
    """Slots: 0 is clean, then point by point each map."""
    _, _, runs = maps_of([Independent(0.0), Independent(0.2), Chip(0.2, chip=1)])
    assert [(each.map, each.slots) for each in runs] == [
        (None, [0, 1, 2]),
        ((1, 0), [3]),
        ((1, 1), [4]),
        ((2, 0), [5, 6]),
    ]


def test_activations_are_drawn_anew_so_that_no_map_stands_for_another():
    model, found, runs = maps_of([Chip(0.3, chip=1)], target="activations")
    assert [each.slots for each in runs] == [[0], [1], [2]]
    outputs = [found.under(runs[1], batch, lambda: run(model)) for batch in (0, 1, 0)]
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], run(model))


@pytest.mark.parametrize("maps", [0, -1, 1.0, True, "2", None])
def test_the_number_of_maps_is_a_positive_integer(maps):
    with pytest.raises(ValueError, match=f"maps must be an integer >= 1, got {maps!r}"):
        checked_maps(maps)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"target": "biases"}, "target must be one of weights, activations, both, got 'biases'"),
    ],
)
def test_what_is_flipped_is_checked_without_a_model(options, says):
    with pytest.raises(ValueError, match=says):
        Flipping(**options)
