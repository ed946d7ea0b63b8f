"""Protected bits are right in every draw; the contract is in test_error_models.py."""

import pytest
import torch

from bnnft.ber import Independent, Key, PerLayer, Protected


def test_the_same_bits_are_right_in_every_draw_and_the_others_read_as_in_the_memory():
    model, weight = Protected(1.0, share=0.3), torch.randn(100, 100)
    wrong = model.flips(weight, Key(0))
    assert torch.equal(model.flips(weight, Key(7, 3)), wrong)
    assert abs(len(wrong) - 7000) < 6 * 46
    few = Protected(0.1, share=0.3).flips(weight, Key(0)).tolist()
    assert set(few) == set(Independent(0.1).flips(weight, Key(0)).tolist()) & set(wrong.tolist())


def test_layers_are_chosen_by_patterns():
    model, weight = Protected(1.0, share=1, layers=["fc1"]), torch.ones(4, 4)
    assert len(model.flips(weight, Key(name="fc1.weight"))) == 0
    assert len(model.flips(weight, Key(name="fc2.weight"))) == 16
    assert (model.bit_rates("fc1.weight"), model.bit_rates("fc2.weight")) == ((0, 0), (1, 1))
    with pytest.raises(ValueError, match=r"the pattern 'fc1' matches no weight; there are conv.weight"):
        model.check_layers(["conv.weight"])


@pytest.mark.parametrize("kept", ["memory", "file"])
def test_neurons_of_the_highest_scores_are_right_as_a_whole(kept, tmp_path):
    scores = {"fc1.weight": torch.tensor([0.1, 3.0, 0.2, 2.0])}
    torch.save(scores, tmp_path / "scores.pt")
    model = Protected(1.0, share=0.5, scores=scores if kept == "memory" else str(tmp_path / "scores.pt"))
    flips = model.flips(torch.ones(4, 3), Key(name="fc1.weight"))
    assert flips.tolist() == [0, 1, 2, 6, 7, 8]
    assert model.bit_rates("fc1.weight") is None  # they differ by neuron
    assert model.bit_rates("fc2.weight") == (0.5, 0.5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"share": 1.5}, ValueError, r"share must be a fraction in \[0, 1\], got 1.5"),
        ({"layers": "fc1"}, TypeError, "layers must be a list of patterns, got the string 'fc1'"),
        ({"scores": 3}, TypeError, "scores must map names of weights to numbers, or name a file, got 3"),
        ({"selection": -1}, ValueError, "selection must be an integer >= 0, got -1"),
    ],
)
def test_bad_arguments_raise(arguments, error, message):
    with pytest.raises(error, match=message):
        Protected(0.1, **arguments)


def test_scores_of_another_size_are_an_error():
    model = Protected(PerLayer({"*": 0.5}), scores={"fc1.weight": [1.0, 2.0]})
    with pytest.raises(
        ValueError, match=r"scores of 'fc1.weight' must be one for each of its 3 neurons, got shape \(2,\)"
    ):
        model.flips(torch.ones(3, 3), Key(name="fc1.weight"))
