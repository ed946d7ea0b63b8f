import csv

import pytest
import torch
from networks import Project, equal_states, loader, small_net, state, trainer
from torch import nn

import bnnft
from bnnft.ber import Independent, Sram65
from bnnft.callbacks import AccuracyOverBER

RATES = [0, 0.05, 0.3]


def test_the_curve_is_that_of_the_plain_function(tmp_path):
    """One pass with all maps in each batch counts the same answers as the function on the bare network."""
    callback, module = AccuracyOverBER(RATES, maps=3, seed=4), Project()
    run = trainer(tmp_path, [callback])
    run.test(module, loader(), verbose=False)
    expected = bnnft.accuracy_over_ber(module.net, loader(), RATES, maps=3, seed=4)
    assert torch.equal(callback.curve.accuracy, expected.accuracy)
    assert callback.curve.clean == expected.clean
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    assert logged["test/acc_ber_0p05"] == pytest.approx(expected.mean[1])
    assert logged["test/tolerable_ber"] == pytest.approx(expected.tolerable_ber(0.01))


class Random(Project):
    """Draws random numbers in training and in every forward."""

    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


def test_measuring_changes_nothing_of_training(tmp_path):
    def fit(callbacks):
        torch.manual_seed(0)
        module = Random()
        run = trainer(tmp_path, callbacks, val_check_interval=3)
        run.fit(module, loader(shuffle=True), loader())
        return state(module)

    measured = fit([AccuracyOverBER(RATES, error_model=Independent(0.2), validation_maps=2)])
    assert equal_states(measured, fit([]))


def test_validation_logs_the_accuracy_under_the_error_model(tmp_path):
    callback, module = AccuracyOverBER(RATES, error_model=Independent(0.2), validation_maps=2), Project()
    run = trainer(tmp_path, [callback])
    run.validate(module, loader(), verbose=False)
    expected = bnnft.accuracy_over_ber(module.net, loader(), [0.2], maps=2).mean[0]
    assert float(run.callback_metrics["val/acc_faulty"]) == pytest.approx(expected)


def test_the_curve_goes_over_the_voltage_of_a_memory_by_itself(tmp_path):
    callback, module = AccuracyOverBER(maps=2, error_model=Sram65(chip=None)), Project()
    run = trainer(tmp_path, [callback])
    run.test(module, loader(), verbose=False)
    expected = bnnft.accuracy_over_ber(module.net, loader(), maps=2, error_model=Sram65(chip=None))
    assert (callback.curve.axis, callback.curve.rates) == ("voltage", (0.55, 0.54, 0.53, 0.52, 0.51, 0.5))
    assert torch.equal(callback.curve.accuracy, expected.accuracy)
    assert "test/acc_voltage_0p55" in run.callback_metrics
    assert AccuracyOverBER().rates == [0, 0.01, 0.05, 0.1, 0.15, 0.2, 0.3]


def test_an_error_while_measuring_leaves_clean_weights(tmp_path):
    calls = []

    def correct(module, batch):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("stumbled")
        return module(batch[0]).argmax(1) == batch[1]

    module = Project()
    with pytest.raises(RuntimeError, match="stumbled"):
        trainer(tmp_path, [AccuracyOverBER(RATES, correct=correct)]).test(module, loader(), verbose=False)
    assert equal_states(state(module), state(Project(small_net())))


def test_the_curve_is_saved(tmp_path):
    callback = AccuracyOverBER(RATES, maps=2, save_dir=str(tmp_path / "curve"))
    trainer(tmp_path, [callback]).test(Project(), loader(), verbose=False)
    with (tmp_path / "curve" / "accuracy_over_ber.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["ber"]) for row in rows] == RATES
    assert [float(row["accuracy"]) for row in rows] == callback.curve.mean
    assert (tmp_path / "curve" / "accuracy_over_ber.png").stat().st_size > 5000
    assert "<svg" in (tmp_path / "curve" / "accuracy_over_ber.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rates": []}, "rates must be a list of one or more strictly ascending numbers"),
        ({"rates": [0.2, 0.1]}, "strictly ascending"),
        ({"rates": [0, 1.5]}, r"rate must be a fraction in \[0, 1\], got 1.5"),
        ({"rates": [0], "maps": 0}, "maps must be an integer >= 1, got 0"),
        ({"rates": [0], "validation_maps": 0}, "maps must be an integer >= 1, got 0"),
        ({"rates": [0], "seed": -2}, "seed must be an integer >= 0, got -2"),
        ({"rates": [0], "drop": 2}, r"drop must be a fraction in \[0, 1\], got 2"),
        ({"rates": [0], "axis": "voltage"}, "axis must name a parameter of the error model"),
    ],
)
def test_bad_arguments_raise_at_construction(arguments, says):
    with pytest.raises(ValueError, match=says):
        AccuracyOverBER(**arguments)


def test_a_model_without_binarized_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no binarized weights"):
        trainer(tmp_path, [AccuracyOverBER([0])]).test(Project(nn.Linear(12, 3)), loader(), verbose=False)
