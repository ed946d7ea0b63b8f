"""Scores single out the neurons that they are to."""

import pytest
import torch
from networks import small_data, small_net
from torch import nn

from bnnft.ber import Key, Protected
from bnnft.metrics.protection import protection_scores

DATA = [small_data(48).tensors]


def network():
    model = small_net().train()
    with torch.no_grad():
        model(torch.randn(100, 12))
    return model.eval()


@pytest.mark.parametrize("by", ["importance", "margin"])
def test_a_dead_neuron_is_the_last_one_and_the_last_layer_has_no_scores(by):
    model = network()
    with torch.no_grad():
        model[1].bias[5] = 100  # its output is 1 always
    model[3].weight.data[:, 5] = torch.tensor([1.0, -1.0] * 8)
    scores = protection_scores(model, DATA, by)
    assert {name: tuple(values.shape) for name, values in scores.items()} == {"0.weight": (16,), "3.weight": (16,)}
    if by == "margin":
        assert int(scores["0.weight"].argmin()) == 5
    assert all(bool((values >= 0).all()) for values in scores.values())


def test_scores_by_margin_fall_with_the_distance_from_the_threshold():
    model = network()
    before = protection_scores(model, DATA, "margin")["0.weight"]
    with torch.no_grad():
        model[1].bias[2] += 3
    assert protection_scores(model, DATA, "margin")["0.weight"][2] < before[2]


def test_an_error_model_takes_them():
    model = network()
    scores = protection_scores(model, DATA)
    flips = Protected(1.0, share=0.25, scores=scores).flips(model[0].weight, Key(name="0.weight"))
    right = set(range(16)) - set((flips // 12).tolist())
    assert right == set(scores["0.weight"].topk(4).indices.tolist())


def test_what_can_not_be_scored_is_an_error():
    with pytest.raises(ValueError, match="by must be one of importance, margin, got 'luck'"):
        protection_scores(network(), DATA, "luck")
    with pytest.raises(ValueError, match="no neuron of Sequential has a score by margin"):
        protection_scores(
            nn.Sequential(network()[6]), [(torch.randn(4, 16), torch.zeros(4, dtype=torch.int64))], "margin"
        )
