"""What a curve goes over: given, or the error model's own."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from bnnft.ber import Asymmetric, Bram28, Chip, ErrorModel, Independent, PerLayer, Rram, Sequence, Sram14, Sram65
from bnnft.evaluation.points import curve_axis, error_models

RATES = [0, 0.01, 0.05, 0.1, 0.15, 0.2, 0.3]
SCALES = [0, 0.25, 0.5, 1, 1.5, 2, 3]


@dataclass(frozen=True)
class FirstBits(ErrorModel):
    """The first bits of each weight read wrong."""

    count: int = 0
    other: float = 0.0

    axis, points = "count", (1, 10, 100)

    def flips(self, weight, key):
        return torch.arange(min(self.count, weight.numel()))


@pytest.mark.parametrize(
    ("model", "axis", "points"),
    [
        (None, "rate", RATES),
        (0.1, "rate", RATES),
        (Independent(0.4), "rate", RATES),
        (Asymmetric(0.02, 0.01), "rate", RATES),
        (Chip(0.1), "rate", RATES),
        (Sram65(), "voltage", [0.55, 0.54, 0.53, 0.52, 0.51, 0.5]),
        (Bram28(), "voltage", [0.6, 0.59, 0.58, 0.57, 0.56, 0.55, 0.54]),
        (Sram14(), "level", [7, 6, 5, 4, 3, 2, 1]),
        (Rram(), "rate", [0, 0.001, 0.005, 0.01, 0.02, 0.033]),
        (PerLayer(), "scale", SCALES),
        (Sequence([0.1]), "scale", SCALES),
        (FirstBits(), "count", [1, 10, 100]),
    ],
    ids=str,
)
def test_axis_and_points_are_the_error_models_own_unless_they_are_given(model, axis, points):
    assert curve_axis(None, model, None) == curve_axis(None, model, axis) == (axis, points)
    assert curve_axis(points[1:3], model, None) == (axis, points[1:3])
    assert len(error_models(None, model)) == len(points)


def test_an_error_model_at_each_point_has_its_other_parameters():
    assert error_models([1, 2], FirstBits(other=0.5)) == [FirstBits(1, 0.5), FirstBits(2, 0.5)]
    assert error_models([0.1, 0.2], FirstBits(3), "other") == [FirstBits(3, 0.1), FirstBits(3, 0.2)]
    assert error_models([0.55, 0.5], Sram65(chip=7)) == [Sram65(0.55, 7), Sram65(0.5, 7)]
    assert error_models([0.0156], Sram65(0.5, chip=7), "rate") == [Chip(0.0156, 7)]
    assert error_models(np.linspace(0, 0.2, 3)) == [Independent(0), Independent(0.1), Independent(0.2)]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"rates": []}, ValueError, r"strictly ascending numbers, got \[\]"),
        ({"rates": [0.2, 0.1]}, ValueError, r"strictly ascending numbers, got \[0.2, 0.1\]"),
        ({"rates": [0.1, 0.1]}, ValueError, "strictly ascending numbers"),
        (
            {"rates": [0.55, 0.55, 0.5], "error_model": Sram65()},
            ValueError,
            r"ascending or descending numbers, got \[0.55",
        ),
        ({"rates": [0.5, 0.5], "error_model": Sram65()}, ValueError, "ascending or descending numbers"),
        ({"rates": [0.55, 0.5, 0.52], "error_model": Sram65()}, ValueError, "ascending or descending numbers"),
        (
            {"rates": [0.5, 0.55], "error_model": Sram65()},
            ValueError,
            "from the fewest errors to the most, got .* 'voltage'",
        ),
        ({"rates": [1, 0.5], "error_model": PerLayer()}, ValueError, "strictly ascending numbers"),
        ({"rates": [0, 2]}, ValueError, r"rate must be a fraction in \[0, 1\], got 2"),
        ({"rates": [math.nan]}, ValueError, r"rate must be a fraction in \[0, 1\], got nan"),
        ({"rates": 0.1}, TypeError, "rates must be a list of numbers, got 0.1"),
        ({"rates": "0.1"}, TypeError, "rates must be a list of numbers, got '0.1'"),
        ({"rates": [0, "0.1"]}, TypeError, "rates must be a list of numbers"),
        ({"rates": [False, True]}, TypeError, "rates must be a list of numbers"),
        (
            {"rates": [0.1], "axis": "volts"},
            ValueError,
            "axis must name a parameter of the error model Independent.*'volts'",
        ),
        (
            {"axis": "rate", "error_model": Sram65()},
            ValueError,
            r"rates must be given for axis 'rate': .*Sram65.* voltage",
        ),
        ({"error_model": "sram65"}, TypeError, "subclass of bnnft.ber.ErrorModel"),
    ],
    ids=str,
)
def test_bad_points_are_named(arguments, error, says):
    with pytest.raises(error, match=says):
        error_models(**arguments)
