import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bnnft import BERCurve, accuracy_over_ber, binarized_weights, flipped
from bnnft.ber import Asymmetric, Chip, ErrorModel, Independent, Key, PerLayer, Sram65
from bnnft.evaluation.accuracy import AccuracyMeter
from bnnft.injection.activation import ActivationFlips, find_activations
from bnnft.nn import BinaryActivation, BinaryLinear

RATES = [0, 0.05, 0.2, 0.5]


def curve(rates, means, clean=0.9, axis="rate"):
    return BERCurve(tuple(rates), torch.tensor([[mean, mean] for mean in means], dtype=torch.float64), clean, axis)


def network():
    """A layer of each kind that measuring could change: batch norm's statistics, dropout's random bits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        BinaryLinear(16, 32, bias=False), nn.BatchNorm1d(32), BinaryActivation(), nn.Dropout(0.5), BinaryLinear(32, 4)
    )
    model(torch.randn(64, 16))  # statistics that are not the initial ones
    return model


def dataset(samples=50):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(samples, 16, generator=generator), torch.randint(4, (samples,), generator=generator)
    )


def loader(**options):
    return DataLoader(dataset(), batch_size=20, **options)


def test_mean_and_deviation_are_over_the_maps_of_each_rate():
    accuracy = torch.rand(3, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    measured = BERCurve((0.0, 0.1, 0.2), accuracy, clean=0.9)
    assert measured.maps == 5
    assert measured.mean == pytest.approx(np.mean(accuracy.numpy(), axis=1))
    assert measured.std == pytest.approx(np.std(accuracy.numpy(), axis=1, ddof=1))


@pytest.mark.parametrize("maps", [2, 5, 20])
def test_interval_is_the_student_t_interval_of_the_mean(maps):
    accuracy = torch.rand(2, maps, dtype=torch.float64, generator=torch.manual_seed(0))
    measured = BERCurve((0.0, 0.1), accuracy, clean=0.9)
    for interval, row in zip(measured.interval, accuracy.numpy(), strict=True):
        assert interval == pytest.approx(stats.t.interval(0.95, maps - 1, row.mean(), stats.sem(row)))


def test_one_map_has_a_mean_but_no_deviation_and_no_interval():
    measured = BERCurve((0.0, 0.1), torch.tensor([[0.9], [0.5]], dtype=torch.float64), clean=0.9)
    assert measured.mean == [0.9, 0.5]
    assert all(math.isnan(value) for value in (*measured.std, *measured.interval[0], *measured.interval[1]))


@pytest.mark.parametrize(
    ("rates", "means", "tolerable"),
    [
        ([0, 0.1, 0.2], [0.9, 0.9, 0.7], 0.15),  # half of the fall is the drop
        ([0, 0.1, 0.2, 0.3], [0.9, 0.85, 0.7, 0.9], 0.1 + 0.1 / 3),  # the first fall counts, not a later rise
        ([0, 0.1, 0.2], [0.9, 0.95, 0.75], 0.175),  # interpolated from above the clean accuracy
        ([0, 0.1, 0.2], [0.9, 0.88, 0.85], 0.2),  # never falls: the highest tested rate
        ([0, 0.1, 0.2], [0.9, 0.8, 0.7], 0.1),  # the drop is exactly reached
        ([0, 0.1, 0.2], [0.9, 0.85, 0.8], 0.2),
        ([0, 0.1, 0.2], [0.9, 0.8, 0.8], 0.2),
        ([0.1, 0.2], [0.5, 0.4], 0.025),  # falls before the first rate: interpolated from the clean accuracy at 0
        ([0.1, 0.2], [0.9, 0.7], 0.15),
        ([0, 0.1], [0.5, 0.4], 0.0),  # falls at the first rate, 0
        ([0.3], [0.9], 0.3),
        ([0.3], [0.7], 0.15),
    ],
    ids=str,
)
def test_tolerable_ber_is_the_rate_where_the_mean_first_falls_below_clean_less_drop(rates, means, tolerable):
    assert curve(rates, means).tolerable_ber(drop=0.1) == pytest.approx(tolerable, abs=1e-9)


def test_rounding_does_not_make_a_drop_of_the_stated_size_larger():
    assert 0.8 - 0.1 > 0.7
    assert curve([0, 0.1, 0.2], [0.8, 0.7, 0.7], clean=0.8).tolerable_ber(drop=0.1) == 0.2


@pytest.mark.parametrize(("drop", "tolerable"), [(0, 0.0), (0.5, 0.1 / 0.9 * 0.5), (0.9, 0.1), (1, 0.1)])
def test_tolerable_ber_grows_with_the_drop(drop, tolerable):
    assert curve([0, 0.1], [0.9, 0.0]).tolerable_ber(drop) == pytest.approx(tolerable, abs=1e-9)


def test_tolerable_ber_allows_a_hundredth_unless_told_otherwise():
    measured = curve([0, 0.1], [0.9, 0.5])
    assert measured.tolerable_ber() == measured.tolerable_ber(0.01)


@pytest.mark.parametrize("drop", [-0.1, 1.5, math.nan])
def test_tolerable_ber_refuses_a_drop_that_is_no_fraction(drop):
    with pytest.raises(ValueError, match=r"drop must be a fraction in \[0, 1\], got"):
        curve([0, 0.1], [0.9, 0.5]).tolerable_ber(drop)


def test_plot_draws_mean_and_band_in_percent():
    figure, axes = curve([0, 0.1], [0.9, 0.5]).plot(label="net")
    assert axes.figure is figure
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[0, 90], [10, 50]])
    assert axes.get_xlabel() == "bit error rate (%)"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["net"]
    assert curve([0, 1], [0.9, 0.5], axis="volts").plot(axes)[1].get_xlabel() == "volts"


def plain_loop(model, batches, rate, draw=0, seed=0, weights=None):
    right = total = 0
    with torch.no_grad(), flipped(model.eval(), rate, seed=seed, draw=draw, weights=weights):
        for inputs, targets in batches:
            right += int((model(inputs).argmax(1) == targets).sum())
            total += len(targets)
    return right / total


@pytest.mark.parametrize("seed", [0, 7])
def test_curve_is_that_of_a_plain_loop_over_rates_maps_and_data(seed):
    measured = accuracy_over_ber(network(), loader(), RATES, maps=3, seed=seed)
    batches = list(loader())
    expected = [[plain_loop(network(), batches, rate, draw, seed) for draw in range(3)] for rate in RATES]
    assert measured.accuracy.tolist() == expected
    assert measured.clean == expected[0][0]
    assert measured.rates == tuple(RATES)
    assert measured.axis == "rate"
    assert measured.accuracy.dtype == torch.float64
    assert len(measured.accuracy[2].unique()) > 1  # maps differ


def test_curve_counts_samples_and_not_batches():
    batches = list(loader())
    merged = [(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))]
    assert len(batches[-1][0]) < len(batches[0][0])
    measured = [accuracy_over_ber(network(), data, RATES, maps=2) for data in (batches, merged)]
    assert torch.equal(measured[0].accuracy, measured[1].accuracy)


def test_weights_select_what_is_turned():
    measured = accuracy_over_ber(network(), loader(), [0.4], maps=1, weights=["4"])
    assert measured.accuracy.item() == plain_loop(network(), loader(), 0.4, weights=["4"])
    assert measured.accuracy.item() != plain_loop(network(), loader(), 0.4)


def test_correct_decides_what_is_right():
    def even(model, batch):
        return model(batch["inputs"]).argmax(1) % 2 == 0

    model, inputs = network(), dataset().tensors[0]
    measured = accuracy_over_ber(model, [{"inputs": inputs}], [0.0], maps=1, correct=even)
    assert measured.clean == (model.eval()(inputs).argmax(1) % 2 == 0).double().mean().item()


@dataclass(frozen=True)
class FirstBits(ErrorModel):
    """The first bits of each weight read wrong."""

    count: int = 0
    other: float = 0.0

    def flips(self, weight, key):
        return torch.arange(min(self.count, weight.numel()))


def test_axis_names_the_parameter_of_the_error_model_that_takes_the_values():
    measured = accuracy_over_ber(network(), loader(), [0, 300], maps=2, error_model=FirstBits(), axis="count")
    assert measured.axis == "count"
    assert measured.rates == (0.0, 300.0)
    assert measured.accuracy[0].tolist() == [measured.clean] * 2
    assert measured.accuracy[1].tolist() == [plain_loop(network(), loader(), FirstBits(300))] * 2


class Watched(nn.Sequential):
    """Remembers in which state it ran."""

    def __init__(self, *modules):
        super().__init__(*modules)
        self.ran = []

    def forward(self, x):
        self.ran.append((self.training, self[1].training, torch.is_grad_enabled()))
        return super().forward(x)


def state_of(model):
    modes = [module.training for module in model.modules()]
    return modes, {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model, before):
    modes, state = state_of(model)
    assert modes == before[0]
    assert all(torch.equal(state[name], value) for name, value in before[1].items())
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_model_modes_statistics_and_random_streams_as_they_were(training):
    model = Watched(*network()).train(training)
    model[3].train(not training)  # a part in another mode than the whole
    before, random_state = state_of(model), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())  # noqa: NPY002
    accuracy_over_ber(model, loader(shuffle=True), RATES, maps=2)
    assert set(model.ran) == {(False, False, False)}
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), random_state[0])
    assert random.getstate() == random_state[1]
    assert np.array_equal(np.random.get_state()[1], random_state[2])  # noqa: NPY002


@pytest.mark.parametrize("call", [1, 2, 5])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(call):
    calls = 0

    def fail(model, batch):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return model(batch[0]).argmax(1) == batch[1]

    model = network().train()
    before, random_state = state_of(model), torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        accuracy_over_ber(model, loader(), RATES, maps=2, correct=fail)
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_data_are_read_once_and_maps_without_a_flip_cost_no_run():
    def batches():
        yield from loader()

    model = Watched(*network())
    measured = accuracy_over_ber(model, batches(), [0, 0.2], maps=4)  # a generator can be read only once
    assert len(model.ran) == 1 + 3 * (1 + 4)  # one to see what the model computes with
    assert measured.accuracy[0].tolist() == [measured.clean] * 4


def test_a_map_is_shared_by_all_batches():
    model = network().eval()
    meter, drawn = AccuracyMeter(model, [Independent(0.2)], maps=1, seed=3), []
    expected = Independent(0.2).flips(model[0].weight, Key(3).at(0))
    for inputs, targets in loader():
        meter.update(lambda inputs=inputs, targets=targets: model(inputs).argmax(1) == targets)
        drawn.append(meter.flips[0][0]["0.weight"])
    assert all(flips is drawn[0] for flips in drawn)
    assert torch.equal(drawn[0], expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"maps": 0}, ValueError, "maps must be an integer >= 1, got 0"),
        ({"maps": 1.5}, ValueError, "maps must be an integer >= 1, got 1.5"),
        ({"maps": True}, ValueError, "maps must be an integer >= 1, got True"),
        ({"rates": []}, ValueError, r"strictly ascending numbers, got \[\]"),
        ({"rates": [0.2, 0.1]}, ValueError, r"strictly ascending numbers, got \[0.2, 0.1\]"),
        ({"rates": [0.1, 0.1]}, ValueError, "strictly ascending"),
        ({"rates": [0, 2]}, ValueError, r"rate must be a fraction in \[0, 1\], got 2"),
        ({"rates": [-0.1, 0]}, ValueError, r"rate must be a fraction in \[0, 1\], got -0.1"),
        ({"rates": [math.nan]}, ValueError, r"rate must be a fraction in \[0, 1\], got nan"),
        ({"axis": "volts"}, ValueError, r"axis must name a parameter of the error model Independent.*got 'volts'"),
        ({"axis": "volts", "error_model": FirstBits()}, ValueError, r"error model FirstBits.*got 'volts'"),
        ({"seed": -1}, ValueError, "seed must be an integer >= 0, got -1"),
        ({"weights": ["lost"]}, ValueError, "'lost' matches no parameter"),
    ],
    ids=str,
)
def test_bad_arguments_raise_before_the_data_are_read(arguments, error, message):
    def unread():
        pytest.fail("the data were read")
        yield

    model = network().train()
    with pytest.raises(error, match=message):
        accuracy_over_ber(**{"model": model, "dataloader": unread(), "rates": [0, 0.1], **arguments})
    assert model.training


def test_no_data_is_an_error():
    with pytest.raises(ValueError, match="needs data, but got no batch"):
        accuracy_over_ber(network(), [], [0, 0.3])


def test_a_model_without_binarized_weights_is_an_error():
    with pytest.raises(ValueError, match="Linear has no binarized weights"):
        accuracy_over_ber(nn.Linear(16, 4), loader(), [0, 0.3])


def test_voltages_go_from_the_highest_down_and_tell_the_lowest_tolerable_one():
    model = network()
    volts = [0.55, 0.53, 0.5]
    measured = accuracy_over_ber(model, loader(), volts, maps=2, error_model=Sram65(chip=None), axis="voltage")
    for volt, accuracy in zip(volts, measured.accuracy, strict=True):
        expected = accuracy_over_ber(model, loader(), [Sram65(volt).rate], maps=2, error_model=Chip(0))
        assert torch.equal(accuracy, expected.accuracy[0])
    with pytest.raises(ValueError, match=r"rates must go from the fewest errors to the most, got .* for axis"):
        accuracy_over_ber(model, loader(), volts[::-1], error_model=Sram65(), axis="voltage")
    falling = curve([0.55, 0.53, 0.5], [0.895, 0.885, 0.5], axis="voltage")
    assert falling.tolerable_ber(0.02) == pytest.approx(0.53 - 0.03 * 0.005 / 0.385)
    assert curve([0.55, 0.5], [0.895, 0.895], axis="voltage").tolerable_ber() == 0.5
    assert math.isnan(curve([0.55, 0.5], [0.5, 0.1], axis="voltage").tolerable_ber())


def test_a_curve_goes_over_the_error_models_own_points_unless_others_are_given():
    model = network()
    by_itself = accuracy_over_ber(model, loader(), maps=2, error_model=Sram65(chip=None))
    expected = accuracy_over_ber(model, loader(), Sram65.points, 2, error_model=Sram65(chip=None), axis="voltage")
    assert (by_itself.axis, by_itself.rates) == ("voltage", (0.55, 0.54, 0.53, 0.52, 0.51, 0.5))
    assert torch.equal(by_itself.accuracy, expected.accuracy)
    plain = accuracy_over_ber(model, loader(), maps=1)
    assert (plain.axis, plain.rates) == ("rate", (0, 0.01, 0.05, 0.1, 0.15, 0.2, 0.3))


def test_a_rate_stands_for_independent_flips():
    models = 0.1, Independent(0.1), None
    measured = [accuracy_over_ber(network(), loader(), [0.3], maps=2, error_model=model) for model in models]
    assert all(torch.equal(curve.accuracy, measured[0].accuracy) for curve in measured)


def test_two_rates_are_swept_by_their_mean():
    model = network()
    error_model = Asymmetric(rate_0_to_1=0.0, rate_1_to_0=0.1)
    measured = accuracy_over_ber(model, loader(), [0, 0.1, 0.3], maps=2, error_model=error_model)
    expected = accuracy_over_ber(model, loader(), [0, 0.2, 0.6], maps=2, error_model=error_model, axis="rate_1_to_0")
    assert torch.equal(measured.accuracy, expected.accuracy)


def test_maps_of_one_chip_are_run_once():
    model, runs = network().eval(), []

    def correct(model, batch):
        runs.append(1)
        return model(batch[0]).argmax(1) == batch[1]

    options = {"maps": 5, "correct": correct}
    fixed = accuracy_over_ber(model, loader(), [0, 0.2], error_model=Chip(0, chip=3), **options)
    ran = len(runs)
    several = accuracy_over_ber(model, loader(), [0, 0.2], error_model=Chip(0), **options)
    batches = len(list(loader()))
    assert ran == 1 + 2 * batches  # the watched one; clean and one map for each batch
    assert len(runs) - ran == 1 + 6 * batches
    assert fixed.std == [0, 0]
    assert several.std[1] > 0


def test_activations_are_flipped_anew_in_each_batch():
    """By hand: a context for each batch and map, whose number is part of the draw."""
    model, right = network().eval(), torch.zeros(2)
    measured = accuracy_over_ber(model, loader(), [0.3], maps=2, seed=3, target="activations")
    for number in range(2):
        for batch, (x, y) in enumerate(loader()):
            key = Key(3, number).part(batch)
            with torch.no_grad(), ActivationFlips(model, find_activations(model), Independent(0.3), key):
                right[number] += (model(x).argmax(1) == y).sum()
    total = sum(len(y) for _, y in loader())
    assert torch.allclose(measured.accuracy[0], (right / total).double())


def test_both_targets_have_the_flips_of_the_weights_too():
    model = network()
    both, weights, activations = (
        accuracy_over_ber(model, loader(), [0.2], maps=3, target=target).accuracy
        for target in ("both", "weights", "activations")
    )
    assert not torch.equal(both, weights)
    assert not torch.equal(both, activations)
    with flipped(model, 0.2, target="both") as flips:
        assert set(flips) == set(binarized_weights(model))
    with flipped(model, 0.2, target="activations") as flips:
        assert flips == {}


def test_patterns_of_layers_that_are_not_there_are_an_error():
    with pytest.raises(ValueError, match=r"the pattern 'conv\*' matches no weight"):
        accuracy_over_ber(network(), loader(), [1], error_model=PerLayer({"conv*": 0.1, "*": 0.1}), axis="scale")
