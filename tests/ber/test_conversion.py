"""What callers and configs may give in place of an error model."""

import collections.abc
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from bnnft.ber import Chip, ErrorModel, Independent, PerLayer, Sequence, Steps, as_error_model
from bnnft.callbacks import AccuracyOverBER, BitFlipTraining


class Look:
    """Has the method, and is no error model."""

    def flips(self, weight, key):
        return torch.arange(3)


@pytest.mark.parametrize("value", [0, 1, 0.25])
def test_a_number_stands_for_independent_flips(value):
    assert as_error_model(value) == Independent(value)


@pytest.mark.parametrize(
    "value", [Look(), Look, Independent, "0.1", None, [0.1], {"rate": 0.1}], ids=lambda v: type(v).__name__
)
def test_anything_else_is_refused_with_what_to_subclass(value):
    with pytest.raises(TypeError, match=r"got .*; errors of another kind .* subclass of bnnft.ber.ErrorModel"):
        as_error_model(value)


@dataclass(frozen=True, eq=False)
class Listed(ErrorModel):
    """Fails at listed places: with parameters of kinds that configs have no name for, and one that is computed."""

    places: torch.Tensor
    parts: collections.abc.Sequence[float | ErrorModel] = ()
    size: int = field(init=False, default=0)

    def __post_init__(self):
        object.__setattr__(self, "size", len(self.places))

    def flips(self, weight, key):
        return self.places


def test_an_error_model_of_ones_own_comes_back_out_of_a_config():
    model = Listed(torch.tensor([2, 5]), (0.5, Chip(0.1, chip=3)))
    back = as_error_model(OmegaConf.create([model], flags={"allow_objects": True})[0])
    assert type(back) is Listed
    assert back.places.tolist() == [2, 5]
    assert back.size == 2
    assert [as_error_model(part) for part in back.parts] == [Independent(0.5), Chip(0.1, chip=3)]


def test_an_error_model_in_a_schema_of_a_config_is_one():
    @dataclass
    class Schema:
        errors: Independent = field(default_factory=lambda: Independent(0.1))

    config = OmegaConf.structured(Schema)
    assert as_error_model(config.errors) == Independent(0.1)


IN_CONTAINERS = """
errors:
  noise: {_target_: bnnft.ber.Independent, rate: 0.1}
  die: {_target_: bnnft.ber.Chip, rate: 0.2, chip: 3}
all: ["${errors.noise}", "${errors.die}", 0.1]
sequence: {_target_: bnnft.ber.Sequence, models: "${all}"}
layers:
  _target_: bnnft.ber.PerLayer
  rates: {"*fc1*": "${errors.die}", "*fc2*": "${sequence}", "*": 0.3}
training: {_target_: bnnft.callbacks.BitFlipTraining, error_model: "${layers}"}
curve: {_target_: bnnft.callbacks.AccuracyOverBER, error_model: "${sequence}"}
"""
NOISE, DIE = Independent(0.1), Chip(0.2, chip=3)
SEQUENCE = Sequence([NOISE, DIE, 0.1])
LAYERS = PerLayer({"*fc1*": DIE, "*fc2*": SEQUENCE, "*": 0.3})


@pytest.mark.parametrize("convert", [{}, *({"_convert_": mode} for mode in ("partial", "object", "all"))], ids=str)
def test_hydra_builds_error_models_inside_of_lists_and_mappings(convert):
    """However it is told to convert containers, and not at all unless it is told."""
    config = OmegaConf.create(IN_CONTAINERS)
    assert instantiate(config.sequence, **convert) == SEQUENCE
    assert instantiate(config.layers, **convert) == LAYERS
    assert instantiate(config.training, **convert).error_model == LAYERS
    assert instantiate(config.curve, **convert).error_model == SEQUENCE
    errors = instantiate(config.errors, **convert)  # of a project that hands them on itself
    assert BitFlipTraining(errors["die"]).error_model == DIE
    assert AccuracyOverBER(error_model=errors["die"]).error_model == DIE
    assert Sequence([errors["noise"], errors["die"], 0.1]) == SEQUENCE


@dataclass
class DieSchema:
    _target_: str = "bnnft.ber.Chip"
    rate: float = 0.2
    chip: int | None = 3


@dataclass
class LayersSchema:
    _target_: str = "bnnft.ber.PerLayer"
    rates: dict[str, Any] = field(default_factory=lambda: {"*fc1*": DieSchema(), "*": 0.3})


@dataclass
class SequenceSchema:
    _target_: str = "bnnft.ber.Sequence"
    models: list[Any] = field(default_factory=lambda: [DieSchema(), LayersSchema()])


@dataclass
class StepsSchema:
    _target_: str = "bnnft.ber.Steps"
    factors: dict[int, float] = field(default_factory=lambda: {5: 0.5})


@pytest.mark.parametrize("given", [lambda schema: schema(), OmegaConf.structured], ids=["dataclass", "config"])
def test_hydra_builds_error_models_and_schedules_of_schemas(given):
    layers = PerLayer({"*fc1*": DIE, "*": 0.3})
    assert instantiate(given(LayersSchema)) == layers
    assert instantiate(given(LayersSchema), rates={"*": DieSchema()}).models["*"] == DIE
    assert instantiate(given(SequenceSchema)) == Sequence([DIE, layers])
    assert instantiate(given(StepsSchema)) == Steps({5: 0.5})
