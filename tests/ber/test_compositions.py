"""Error models that are made of others: by layer, and one after the other."""

import pytest
import torch

from bnnft.ber import Asymmetric, Chip, Independent, Key, PerLayer, Sequence, Sram65, check_layers, scaled

WEIGHT = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
NAMES = ["model.fc1.weight", "model.fc2.weight", "model.fc10.weight"]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("name", "rate"),
    [("model.fc1.weight", 0.3), ("model.fc2.weight", 0.1), ("model.fc10.weight", 0.2), ("other.weight", 0.05)],
)
def test_the_most_exact_pattern_counts_in_any_order(name, rate, order):
    rates = {"*": 0.05, "*fc*": 0.1, "*fc1*": 0.2, "model.fc1": 0.3}
    model, key = PerLayer(dict(list(rates.items())[::order])), Key(1, name=name)
    assert torch.equal(model.flips(WEIGHT, key), Independent(rate).flips(WEIGHT, key))


def test_a_pattern_may_have_an_error_model():
    key = Key(1, name="a")
    model = PerLayer({"a": Asymmetric(0, 0.1), "b": 0.2})
    assert torch.equal(model.flips(WEIGHT, key), Asymmetric(0, 0.1).flips(WEIGHT, key))


def test_a_scale_multiplies_all_rates():
    assert PerLayer({"*": 0.1, "b": Asymmetric(0.2, 0.1)}, scale=0.5).models == {
        "*": Independent(0.05),
        "b": Asymmetric(0.1, 0.05),
    }
    assert Sequence([Chip(0.1, chip=7), 0.2], scale=2).parts == (Chip(0.2, chip=7), Independent(0.4))
    assert scaled(Sequence([0.1]), 0.5) == Sequence([0.1], scale=0.5)
    assert Sequence([Sram65(0.5)], scale=0.5).parts == (Chip(0.0078, chip=0),)


def test_patterns_and_weights_must_fit():
    check_layers(PerLayer({"*fc1*": 0.1, "*": 0.2}), NAMES)
    with pytest.raises(ValueError, match=r"rates: the pattern '\*conv\*' matches no weight; there are model.fc1"):
        check_layers(PerLayer({"*conv*": 0.1, "*": 0.2}), NAMES)
    with pytest.raises(ValueError, match=r"rates: no pattern matches the weight 'model.fc2.weight'; there are \*fc1\*"):
        check_layers(PerLayer({"*fc1*": 0.1}), NAMES)
    with pytest.raises(ValueError, match="no pattern matches the weight 'a'"):
        PerLayer({"b": 0.1}).flips(WEIGHT, Key(name="a"))
    with pytest.raises(ValueError, match="matches no weight"):
        check_layers(Sequence([0.1, PerLayer({"*": 0.1, "conv": 0.1})]), NAMES)


def test_a_bit_that_is_turned_twice_is_right_again():
    first, second = Chip(0.3, chip=7), Independent(0.4)
    turned = torch.zeros(2, WEIGHT.numel(), dtype=torch.bool)
    turned[0, first.flips(WEIGHT, Key(1))] = True
    turned[1, second.flips(WEIGHT, Key(1).part(1))] = True
    expected = (turned[0] ^ turned[1]).nonzero().squeeze(1)
    assert torch.equal(Sequence([first, second]).flips(WEIGHT, Key(1)), expected)
    assert len(Sequence([first, first]).flips(WEIGHT, Key(1))) == 0


def test_a_later_error_reads_what_the_earlier_ones_left():
    ones_to_zeros, zeros_to_ones = Asymmetric(0, 1), Asymmetric(1, 0)
    assert len(Sequence([ones_to_zeros, zeros_to_ones]).flips(torch.ones(10), Key())) == 0
    assert len(Sequence([zeros_to_ones, ones_to_zeros]).flips(torch.ones(10), Key())) == 10
    zeros = torch.tensor([0.0, -0.0])
    assert Sequence([ones_to_zeros, zeros_to_ones]).flips(zeros, Key()).tolist() == [1]


def test_equal_parts_of_a_sequence_draw_apart():
    assert len(Sequence([0.5, 0.5]).flips(WEIGHT, Key(1))) > 4000


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: PerLayer({}), TypeError, "rates must map one or more patterns to rates or error models, got {}"),
        (lambda: PerLayer([0.1]), TypeError, "rates must map"),
        (lambda: PerLayer({"*": 1.5}), ValueError, r"rate must be a fraction in \[0, 1\], got 1.5"),
        (lambda: PerLayer({"*": 0.6}, scale=2), ValueError, r"rate must be a fraction in \[0, 1\], got 1.2"),
        (lambda: PerLayer({"*": 0.6}, scale=-1), ValueError, "scale must be a number >= 0, got -1"),
        (lambda: Sequence([]), TypeError, "models must be a list of one or more rates or error models"),
        (lambda: Sequence("0.1"), TypeError, "rate must be a fraction|models must be a list"),
        (lambda: Sequence([0.1], scale="2"), ValueError, "scale must be a number >= 0, got '2'"),
    ],
)
def test_bad_arguments_are_named(build, error, says):
    with pytest.raises(error, match=says):
        build()
