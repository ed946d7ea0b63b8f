"""Which weight has which errors; their draws are held in test_error_models.py."""

import pytest
import torch

from bnnft.ber import Asymmetric, Independent, Key, PerLayer

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


def test_every_pattern_must_match_a_weight():
    PerLayer({"*fc1*": 0.1, "*": 0.2}).check_layers(NAMES)
    with pytest.raises(ValueError, match=r"rates: the pattern '\*conv\*' matches no weight; there are model.fc1"):
        PerLayer({"*conv*": 0.1, "*": 0.2}).check_layers(NAMES)
    with pytest.raises(ValueError, match="matches no weight"):
        PerLayer({"*fc1*": PerLayer({"*fc2*": 0.1}), "*": 0.1}).check_layers(NAMES)


def test_a_weight_that_no_pattern_matches_has_no_errors():
    model = PerLayer({"*fc2*": 0.3})
    model.check_layers(NAMES)
    flips = [model.flips(WEIGHT, Key(1, name=name)) for name in NAMES]
    assert torch.equal(flips[1], Independent(0.3).flips(WEIGHT, Key(1)))
    assert [len(each) for each in (flips[0], flips[2])] == [0, 0]
    assert flips[0].dtype == torch.int64


@pytest.mark.parametrize("order", [1, -1])
def test_of_equally_exact_patterns_the_last_by_the_alphabet_counts(order):
    rates = {"fc1*": 0.1, "*fc1": 0.2}
    model = PerLayer(dict(list(rates.items())[::order]))
    assert torch.equal(model.flips(WEIGHT, Key(1, name="fc1.fc1")), Independent(0.1).flips(WEIGHT, Key(1)))


def test_all_layers_have_errors_unless_rates_are_given():
    assert PerLayer() == PerLayer({"*": 0.05})


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: PerLayer({}), TypeError, "rates must map one or more patterns to rates or error models, got {}"),
        (lambda: PerLayer([0.1]), TypeError, "rates must map"),
        (lambda: PerLayer({"*": 1.5}), ValueError, r"rate must be a fraction in \[0, 1\], got 1.5"),
        (lambda: PerLayer({"*": 0.6}, scale=2), ValueError, r"rate must be a fraction in \[0, 1\], got 1.2"),
        (lambda: PerLayer({"*": 0.6}, scale=-1), ValueError, "scale must be a number >= 0, got -1"),
    ],
)
def test_bad_arguments_are_named(build, error, says):
    with pytest.raises(error, match=says):
        build()
