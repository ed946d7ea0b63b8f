"""Maps nest, chips are independent; rates are held in test_error_models.py. False alarm of each test: 1e-9."""

import itertools

import pytest
import torch
from scipy.stats import binomtest

from bnnft.ber import Chip, Independent, Key, Sequence, Sram65

WEIGHT = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
RATES = [0.0, 1e-6, 0.001, 0.05, 0.3, 0.9, 1.0]


def mask(model, key=None, weight=WEIGHT):
    found = torch.zeros(weight.numel(), dtype=torch.bool)
    found[model.flips(weight, key or Key())] = True
    return found


@pytest.mark.parametrize("kind", ["flip", "stuck_at"])
@pytest.mark.parametrize("chip", [7, None])
def test_what_fails_at_a_rate_fails_at_every_higher_one(kind, chip):
    maps = [mask(Chip(rate, chip, kind), Key(4)) for rate in RATES]
    for low, high in itertools.pairwise(maps):
        assert bool((low <= high).all())


def test_a_cell_fails_where_its_own_number_is_below_the_rate():
    """The rates at which single cells begin to fail are spread evenly: a count below each tenth."""
    for tenth in range(1, 10):
        count = mask(Chip(tenth / 10, chip=1)).sum()
        assert binomtest(int(count), WEIGHT.numel(), tenth / 10).pvalue > 1e-9


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (Chip(0.2, chip=8), Key()),
        (Chip(0.2, chip=7), Key(position=1)),
        (Chip(0.2), Key(7)),
        (Independent(0.2), Key(7, purpose="training")),
    ],
    ids=str,
)
def test_chips_and_weights_and_noise_are_independent(other, key):
    both = mask(Chip(0.1, chip=7)) & mask(other, key)
    assert binomtest(int(both.sum()), WEIGHT.numel(), 0.02).pvalue > 1e-9


def test_a_fixed_chip_is_the_same_under_every_seed_draw_and_purpose_and_part_of_a_sequence():
    expected = mask(Chip(0.1, chip=7))
    for key in (Key(1), Key(0, 5), Key(purpose="training"), Key(name="a"), Key().part(3)):
        assert torch.equal(mask(Chip(0.1, chip=7), key), expected)
    assert torch.equal(mask(Sequence([0.0, Chip(0.1, chip=7)])), expected)


def test_each_draw_without_a_number_is_another_chip():
    maps = [mask(Chip(0.1), Key(1, draw)) for draw in range(3)]
    assert not torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[1], maps[2])


def test_a_fixed_chip_is_drawn_once():
    model = Chip(0.1, chip=7)
    assert model.flips(WEIGHT, Key(1)) is model.flips(WEIGHT, Key(2, 3))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_stuck_cell_reads_one_bit_whatever_is_stored(share):
    model = Chip(0.2, 5, "stuck_at", share)
    zeros, ones = mask(model, weight=-torch.ones(WEIGHT.numel())), mask(model, weight=torch.ones(WEIGHT.numel()))
    assert not bool((zeros & ones).any())
    assert torch.equal(zeros | ones, mask(Chip(0.2, 5)))
    assert binomtest(int(zeros.sum()), int((zeros | ones).sum()), share).pvalue > 1e-9
    assert torch.equal(mask(model), torch.where(WEIGHT > 0, ones, zeros))


def test_a_lower_voltage_of_a_memory_only_adds_failing_cells():
    maps = [mask(Sram65(voltage)) for voltage in (0.55, 0.53, 0.51, 0.5)]
    for low, high in itertools.pairwise(maps):
        assert bool((low <= high).all())
    assert maps[0].sum() < maps[-1].sum()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"rate": 1.5}, ValueError, r"rate must be a fraction in \[0, 1\], got 1.5"),
        ({"rate": 0.1, "chip": -1}, ValueError, "chip must be an integer >= 0, or null"),
        ({"rate": 0.1, "chip": 1.0}, ValueError, "chip must be an integer >= 0, or null"),
        ({"rate": 0.1, "kind": "stuck"}, ValueError, "kind must be one of flip, stuck_at, got 'stuck'"),
        ({"rate": 0.1, "stuck_at_1": 0.5}, ValueError, "stuck_at_1 is for kind='stuck_at', got 0.5 with kind='flip'"),
        ({"rate": 0.1, "kind": "stuck_at", "stuck_at_1": 2}, ValueError, "stuck_at_1 must be a fraction"),
    ],
)
def test_bad_arguments_are_named(arguments, error, says):
    with pytest.raises(error, match=says):
        Chip(**arguments)
