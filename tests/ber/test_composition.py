"""What error models that are made of others have in common."""

from dataclasses import dataclass

import pytest
import torch

from bnnft.ber import Asymmetric, Chip, ErrorModel, Independent, PerLayer, Rram, Sequence, Sram65


def test_a_scale_multiplies_all_rates():
    assert PerLayer({"*": 0.1, "b": Asymmetric(0.2, 0.1)}, scale=0.5).models == {
        "*": Independent(0.05),
        "b": Asymmetric(0.1, 0.05),
    }
    assert Sequence([Chip(0.1, chip=7), 0.2], scale=2).parts == (Chip(0.2, chip=7), Independent(0.4))
    assert Sequence([0.1]).scaled(0.5) == Sequence([0.1], scale=0.5)
    assert Sequence([0.1], scale=3).scaled(0.5) == Sequence([0.1], scale=1.5)
    assert Sequence([Sram65(0.5)], scale=0.5).parts == (Chip(0.0078, chip=0),)


@pytest.mark.parametrize(
    ("model", "points"),
    [
        (PerLayer(), [0, 0.25, 0.5, 1, 1.5, 2, 3]),
        (PerLayer({"*": 0.05, "a": 0.6}), [0, 0.25, 0.5, 1, 1.5]),
        (Sequence([Chip(0.5), 0.1]), [0, 0.25, 0.5, 1, 1.5, 2]),
        (Sequence([Rram()]), [0, 0.25, 0.5, 1]),  # no rate above the published one
        (Sequence([PerLayer({"*": 0.9})], scale=0.5), [0, 0.25, 0.5, 1]),
    ],
    ids=str,
)
def test_a_curve_goes_over_the_scales_that_all_rates_can_have(model, points):
    assert model.axis == "scale"
    assert list(model.points) == points
    assert [model.at("scale", point).scale for point in points] == points


def test_errors_without_a_rate_can_be_part_of_a_curve_at_their_own_scale_only():
    @dataclass(frozen=True)
    class EveryOther(ErrorModel):
        def flips(self, weight, key):
            return torch.arange(0, weight.numel(), 2)

    model = Sequence([EveryOther(), 0.1])
    assert list(model.points) == [1]
    with pytest.raises(TypeError, match=r"EveryOther\(\) has no rate to set"):
        model.scaled(0.5)


def test_what_is_made_of_memories_names_their_sources_once():
    model = Sequence([PerLayer({"a": Sram65(), "b": Sram65(0.5)}), Rram(), 0.1])
    assert model.source == f"{Sram65.source}; {Rram.source}"
    assert Sequence([0.1]).source == ""


@pytest.mark.parametrize(("parts", "reads"), [([0.1, Chip(0.1)], False), ([0.1, Asymmetric(0, 0.1)], True)], ids=str)
def test_flips_depend_on_bits_where_those_of_a_part_do(parts, reads):
    assert Sequence(parts).reads_bits == reads
    assert PerLayer(dict(zip("ab", parts, strict=True))).reads_bits == reads
