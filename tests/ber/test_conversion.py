"""What callers may give in place of an error model; what configs take apart is held in test_error_models.py."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from omegaconf import OmegaConf

from bnnft.ber import Chip, ErrorModel, Independent, as_error_model


class Look:
    """Has the method, and is no error model."""

    def flips(self, weight, key):
        return torch.arange(3)


@pytest.mark.parametrize("value", [0, 1, 0.25])
def test_a_number_stands_for_independent_flips(value):
    assert as_error_model(value) == Independent(value)


@pytest.mark.parametrize("value", [Look(), Look, Independent, "0.1", None, [0.1], {"rate": 0.1}], ids=str)
def test_anything_else_is_refused_with_what_to_subclass(value):
    with pytest.raises(TypeError, match=r"got .*; errors of another kind .* subclass of bnnft.ber.ErrorModel"):
        as_error_model(value)


@dataclass(frozen=True, eq=False)
class Listed(ErrorModel):
    """Fails at listed places: with parameters of kinds that configs have no name for, and one that is computed."""

    places: torch.Tensor
    parts: Sequence[float | ErrorModel] = ()
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
