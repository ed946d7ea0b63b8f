"""Published figures: at the measured points exactly, between them log-linear, refused outside."""

import pytest
import torch

from bnnft.ber import Bram28, Chip, Clustered, Independent, Key, Rram, Sram14, Sram65

BRAM = {0.60: 1.19e-7, 0.59: 7.11e-7, 0.58: 4.33e-6, 0.57: 2.29e-5, 0.56: 8.09e-5, 0.55: 2.23e-4, 0.54: 7.02e-4}
FAULTY = [1.213e-2, 3.98e-3, 1.214e-3, 1.55e-4, 1.26e-4, 4.07e-5, 1.31e-5]


@pytest.mark.parametrize(
    ("model", "stands_for"),
    [
        (Sram65(0.55), Chip(2.3e-3, 0)),
        (Sram65(0.5, chip=3), Chip(1.56e-2, 3)),
        (Sram65(0.525), Chip((2.3e-3 * 1.56e-2) ** 0.5, 0)),
        *((Bram28(voltage), Chip(rate, 0, "stuck_at", 0.0)) for voltage, rate in BRAM.items()),
        (Bram28(0.54, 5, "bitline"), Clustered(7.02e-4, 5, "stuck_at", 0.0)),
        (Rram(), Independent(0.033)),
        *((Sram14(level), Chip(share, 0, "stuck_at", 0.5)) for level, share in enumerate(FAULTY, start=1)),
    ],
    ids=str,
)
def test_a_memory_stands_for_published_rates(model, stands_for):
    assert model.model.rate == pytest.approx(stands_for.rate, rel=1e-12)
    parts = {name: value for name, value in vars(stands_for).items() if name not in ("rate", "_maps")}
    assert {name: getattr(model.model, name) for name in parts} == parts
    assert type(model.model) is type(stands_for)
    weight = torch.randn(2000, 100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.flips(weight, Key(1)), model.model.flips(weight, Key(1)))


@pytest.mark.parametrize("high", [0.60, 0.59, 0.58, 0.57, 0.56, 0.55])
def test_between_measured_voltages_the_logarithm_is_linear(high):
    low = round(high - 0.01, 2)
    middle = Bram28((high + low) / 2).rate
    assert middle**2 == pytest.approx(Bram28(high).rate * Bram28(low).rate)


def test_block_ram_leaves_zeros_right():
    assert len(Bram28(0.54).flips(-torch.ones(1_000_000), Key())) == 0
    assert len(Bram28(0.54).flips(torch.ones(1_000_000), Key())) > 500


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Sram65(0.6), r"voltage must be in \[0.5, 0.55\] V, where it was measured, got 0.6 \(Sun et al."),
        (lambda: Sram65(0.49), "voltage must be in"),
        (lambda: Sram65("low"), "voltage must be in .* got 'low'"),
        (lambda: Bram28(0.53), r"voltage must be in \[0.54, 0.6\] V.*MICRO 2018"),
        (lambda: Bram28(placement="row"), "placement must be one of independent, bitline, got 'row'"),
        (lambda: Rram(0.05), r"rate must be in \[0, 0.033\], the published upper value, got 0.05"),
        (lambda: Sram14(0), r"level must be an integer in \[1, 7\], got 0 \(github.com/IBM/NeuralFuse"),
        (lambda: Sram14(1.5), "level must be an integer"),
        (lambda: Sram65(chip=-1), "chip must be an integer >= 0"),
    ],
)
def test_what_is_not_published_is_refused_with_the_source(build, says):
    with pytest.raises(ValueError, match=says):
        build()


@pytest.mark.parametrize("model", [Sram65(), Bram28(), Rram(), Sram14()], ids=str)
def test_every_memory_names_its_source(model):
    assert len(model.source) > 20


def test_a_schedule_may_lower_the_rate_of_a_memory():
    assert Sram65(0.5, chip=2).scaled(0.5) == Chip(0.0078, 2)
    assert Sram14(1).scaled(0.5) == Chip(1.213e-2 / 2, 0, "stuck_at", 0.5)
    assert Rram().scaled(0.5) == Rram(0.0165)
