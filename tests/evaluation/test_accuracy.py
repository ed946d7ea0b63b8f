import math
import random
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MultilabelAveragePrecision
from torchmetrics.segmentation import MeanIoU

from bnnft import accuracy_over_ber, binarized_weights, flipped
from bnnft.ber import Asymmetric, Chip, ErrorModel, Independent, Key, PerLayer, Sram65
from bnnft.evaluation.accuracy import error_models
from bnnft.injection.activation import ActivationFlips, find_activations
from bnnft.nn import BinaryActivation, BinaryLinear

RATES = [0, 0.05, 0.2, 0.5]


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


def by_hand(model, errors, draw=0, seed=0, weights=("0.weight", "4.weight")):
    """The drawn weights times -1, in a call that knows nothing of flips."""
    errors = errors if hasattr(errors, "flips") else Independent(errors)
    changed = {}
    for position, (name, weight) in enumerate(model.named_parameters()):
        if name in weights:
            signs = torch.ones(weight.numel())
            signs[errors.flips(weight.detach(), Key(seed, draw).at(position, name))] = -1
            changed[name] = weight.detach() * signs.view_as(weight)
    return lambda inputs: functional_call(model.eval(), changed, inputs)


def plain_loop(model, batches, errors, **options):
    run, right, total = by_hand(model, errors, **options), 0, 0
    for inputs, targets in batches:
        scores = run(inputs)
        right += int((scores.argmax(1) == targets).sum())
        total += len(targets)
    return right / total


@pytest.mark.parametrize("seed", [0, 7])
def test_curve_is_that_of_a_plain_loop_over_rates_maps_and_data(seed):
    measured = accuracy_over_ber(network(), loader(), RATES, maps=3, seed=seed)
    batches = list(loader())
    expected = [[plain_loop(network(), batches, rate, draw=draw, seed=seed) for draw in range(3)] for rate in RATES]
    assert measured.accuracy.tolist() == expected
    assert measured.clean == expected[0][0]
    assert measured.rates == tuple(RATES)
    assert (measured.axis, measured.name, measured.score) == ("rate", "", "accuracy")
    assert measured.accuracy.dtype == torch.float64
    assert len(measured.accuracy[2].unique()) > 1  # maps differ


def test_curve_counts_samples_and_not_batches():
    batches = list(loader())
    merged = [(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))]
    assert len(batches[-1][0]) < len(batches[0][0])
    measured = [accuracy_over_ber(network(), data, RATES, maps=2) for data in (batches, merged)]
    assert torch.equal(measured[0].accuracy, measured[1].accuracy)


def test_weights_select_what_is_flipped():
    measured = accuracy_over_ber(network(), loader(), [0.4], maps=1, weights=["4"])
    assert measured.accuracy.item() == plain_loop(network(), loader(), 0.4, weights=["4.weight"])
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
    assert error_models([1, 2], FirstBits(other=0.5), "count") == [FirstBits(1, 0.5), FirstBits(2, 0.5)]
    measured = accuracy_over_ber(network(), loader(), [0, 300], maps=2, error_model=FirstBits(), axis="count")
    assert measured.axis == "count"
    assert measured.rates == (0.0, 300.0)
    assert measured.accuracy[0].tolist() == [measured.clean] * 2
    assert measured.accuracy[1].tolist() == [plain_loop(network(), loader(), FirstBits(300))] * 2


class Watched(nn.Sequential):
    """Remembers in which state it ran, outside of itself, since what it keeps is put back."""

    ran: ClassVar[list] = []

    def __init__(self, *modules):
        super().__init__(*modules)
        self.ran.clear()

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
    assert len(model.ran) == 3 * (1 + 4)
    assert measured.accuracy[0].tolist() == [measured.clean] * 4


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


def test_voltages_go_from_the_highest_down():
    model = network()
    volts = [0.55, 0.53, 0.5]
    measured = accuracy_over_ber(model, loader(), volts, maps=2, error_model=Sram65(chip=None), axis="voltage")
    for volt, accuracy in zip(volts, measured.accuracy, strict=True):
        expected = accuracy_over_ber(model, loader(), [Sram65(volt).rate], maps=2, error_model=Chip(0))
        assert torch.equal(accuracy, expected.accuracy[0])
    with pytest.raises(ValueError, match=r"rates must go from the fewest errors to the most, got .* for axis"):
        accuracy_over_ber(model, loader(), volts[::-1], error_model=Sram65(), axis="voltage")


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
    assert ran == 2 * batches  # clean and one map for each
    assert len(runs) - ran == 6 * batches
    assert fixed.std == [0, 0]
    assert several.std[1] > 0


def test_activations_are_flipped_anew_in_each_batch():
    """By hand: a context for each batch and map, whose number is part of the draw."""
    model, right = network().eval(), torch.zeros(2)
    measured = accuracy_over_ber(model, loader(), [0.3], maps=2, seed=3, target="activations")
    for number in range(2):
        for batch, (x, y) in enumerate(loader()):
            key = Key(3, number).part(batch)
            with torch.no_grad(), ActivationFlips(model, find_activations(model), Independent(0.3), key, exact=False):
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


def test_any_other_score_is_that_of_a_plain_loop():
    """Mean squared error of each map: by torchmetrics, by a function, and by hand on all samples at once."""

    def squared_error(model, batch):
        inputs, targets = batch
        return (model(inputs) - targets).square().sum(), targets.numel()

    model, x = network().eval(), dataset().tensors[0]
    y = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))
    data = [(x[:20], y[:20]), (x[20:40], y[20:40]), (x[40:], y[40:])]
    metric = MeanSquaredError()
    measured = accuracy_over_ber(model, data, [0, 0.2], maps=2, score=metric)
    counted = accuracy_over_ber(model, data, [0, 0.2], maps=2, score=squared_error, higher_is_better=False)
    with torch.no_grad():
        clean = float((model(x) - y).square().mean())
        expected = [float((by_hand(model, 0.2, draw=draw)(x) - y).square().mean()) for draw in range(2)]
    assert measured.clean == pytest.approx(clean)
    assert measured.values[0].tolist() == [measured.clean] * 2
    assert measured.values[1].tolist() == pytest.approx(expected)
    assert len({clean, *expected}) == 3
    assert counted.values.flatten().tolist() == pytest.approx(measured.values.flatten().tolist())
    assert (measured.score, measured.higher_is_better) == ("mean_squared_error", False)
    assert (counted.score, counted.higher_is_better, counted.bounds) == ("squared_error", False, (-math.inf, math.inf))
    assert metric.update_count == 0  # the one that was given is as it was


def test_predictions_by_name_and_answers_of_another_shape():
    """Mean intersection over union of a segmentation, and several labels a sample."""
    model, x = network().eval(), dataset().tensors[0]
    classes = torch.randint(0, 2, (50, 4), generator=torch.Generator().manual_seed(3))

    def predict(model, batch):
        return {"preds": (model(batch["x"]) > 0).long()[:, :, None], "target": batch["y"][:, :, None]}

    iou = MeanIoU(num_classes=2, input_format="index")
    measured = accuracy_over_ber(model, [{"x": x, "y": classes}], [0.3], maps=2, score=iou, predict=predict)
    iou.update(**predict(model, {"x": x, "y": classes}))
    assert measured.clean == pytest.approx(float(iou.compute()))
    labels = accuracy_over_ber(model, [(x, classes)], [0.3], maps=2, score=MultilabelAveragePrecision(4))
    assert labels.clean == pytest.approx(float(MultilabelAveragePrecision(4)(model(x), classes)))
    assert labels.bounds == (0, 1)


def test_answers_that_are_no_number_count_as_wrong_and_are_said_once():
    class Broken(nn.Sequential):
        def forward(self, x):
            scores = super().forward(x)
            return torch.where(torch.arange(len(x))[:, None] % 2 == 0, torch.nan, scores)

    model, x = Broken(*network()).eval(), dataset().tensors[0]
    targets = network().eval()(x).argmax(1)
    targets[::2] = 0  # what argmax makes of NaN
    with pytest.warns(UserWarning, match="50 of 100 answers under all maps count as wrong") as said:
        measured = accuracy_over_ber(model, [(x, targets)], [0], maps=1)
    assert measured.clean == 0.5
    assert len(said) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"score": 3}, TypeError, "score must be one torchmetrics Metric .* or a function of model and batch, got 3"),
        ({"score": len, "correct": len}, ValueError, "correct= and score= exclude each other"),
        ({"predict": len}, ValueError, "predict= says what a torchmetrics metric is updated with"),
        ({"predict": len, "score": len}, ValueError, "predict= says what a torchmetrics metric is updated with"),
        ({"higher_is_better": False}, ValueError, "higher_is_better is True for accuracy, got False"),
    ],
)
def test_bad_scores_raise_before_the_data_are_read(arguments, error, message):
    with pytest.raises(error, match=message):
        accuracy_over_ber(network(), None, [0], **arguments)
