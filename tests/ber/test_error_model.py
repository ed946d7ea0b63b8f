"""What an error model has without saying so, and how it says otherwise."""

from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch

from bnnft.ber import ErrorModel, Independent, Key, checked_flips


@dataclass(frozen=True)
class EveryOther(ErrorModel):
    step: int

    def flips(self, weight, key):
        return torch.arange(0, weight.numel(), self.step)


class Plain(ErrorModel):
    """No dataclass: the parameters are the arguments of the constructor all the same."""

    def __init__(self, step=2, rate=0.5):
        self.step, self.rate = step, rate

    def flips(self, weight, key):
        return torch.arange(0, weight.numel(), self.step)


def test_flips_alone_have_to_be_written():
    class Nothing(ErrorModel):
        pass

    with pytest.raises(TypeError, match=r"abstract method '?flips"):
        Nothing()
    assert EveryOther(3).flips(torch.zeros(7), Key()).tolist() == [0, 3, 6]


def test_defaults():
    model = EveryOther(3)
    assert model.reads_bits is True
    assert model.rate is None
    assert model.source == ""
    assert model.axis == "rate"
    assert list(model.points) == [0, 0.01, 0.05, 0.1, 0.15, 0.2, 0.3]
    assert model.check_layers(["fc1.weight"]) is None
    assert model.bit_rates("fc1.weight") is None


@pytest.mark.parametrize("name", ["reads_bits", "rate", "source", "axis", "points"])
def test_a_field_without_a_default_stays_required_whatever_the_base_class_has(name):
    """A dataclass takes an attribute of a base class for the default of a field."""
    namespace = {"__annotations__": {name: object}, "flips": EveryOther.flips}
    model = dataclass(frozen=True)(type("Model", (ErrorModel,), namespace))
    with pytest.raises(TypeError, match=f"missing 1 required positional argument: '{name}'"):
        model()
    assert getattr(model("given"), name) == "given"


def test_another_value_of_one_parameter_leaves_the_others():
    @dataclass(frozen=True)
    class Two(EveryOther):
        rate: float = 0.1

    assert [each.name for each in fields(Two)] == ["step", "rate"]
    assert Two(2, 0.3).at("step", 4) == Two(4, 0.3)
    assert Two(2, 0.3).at("rate", 0.4) == Two(2, 0.3).at_rate(0.4) == Two(2, 0.4)
    assert Two(2, 0.3).scaled(0.5) == Two(2, 0.15)
    assert repr(Plain(2, 0.3).at("step", 4)) == "Plain(step=4, rate=0.3)"
    assert Plain(2, 0.3).scaled(0.5).rate == 0.15


def test_what_is_no_parameter_is_named():
    with pytest.raises(ValueError, match=r"axis must name .* error model EveryOther\(step=3\), got 'v'"):
        EveryOther(3).at("v", 1)
    with pytest.raises(ValueError, match="got 'reads_bits'"):
        Independent(0.1).at("reads_bits", True)


@pytest.mark.parametrize("change", [lambda model: model.at("rate", 0.1), lambda model: model.scaled(0.5)])
def test_without_a_rate_none_can_be_set(change):
    with pytest.raises(TypeError, match=r"EveryOther\(step=3\) has no rate to set: it needs a field `rate`"):
        change(EveryOther(3))
    assert EveryOther(3).scaled(1) == EveryOther(3)


def test_the_error_model_of_the_readme_works_as_it_says():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    code = text.split("## A new error model")[1].split("```python")[1].split("```")[0]
    names = {"__name__": "readme"}
    exec(code, names)
    model = names["EveryOther"](100)
    flips = model.flips(torch.zeros(3, 100), Key())
    assert checked_flips(flips, torch.zeros(3, 100), model, "fc1.weight").tolist() == [0, 100, 200]
    assert not model.reads_bits
    assert [model.at(model.axis, point).step for point in model.points] == [1000, 100, 10]
