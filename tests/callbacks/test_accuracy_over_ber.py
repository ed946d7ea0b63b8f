import csv
import warnings
from inspect import signature

import pytest
import torch
from lightning import Callback
from networks import Project, equal_states, loader, small_net, state, trainer
from recorded import Plain
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

import bnnft
from bnnft.ber import Chip, Independent, Sram65
from bnnft.callbacks import AccuracyOverBER
from bnnft.evaluation.scores import as_score
from bnnft.nn import BinaryLinear

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
        ({"rates": [0], "name": ""}, "name must be made of letters, digits, _ and -, got ''"),
        ({"rates": [0], "name": "a/b"}, "name must be made of letters, digits, _ and -, got 'a/b'"),
        ({"rates": [0], "name": "a.b"}, "name must be made of letters, digits, _ and -, got 'a.b'"),
        ({"rates": [0], "score": len, "correct": len}, "correct= and score= exclude each other"),
        ({"rates": [0], "score": len, "drop": -1}, "drop must be a number >= 0, got -1"),
    ],
)
def test_bad_arguments_raise_at_construction(arguments, says):
    with pytest.raises(ValueError, match=says):
        AccuracyOverBER(**arguments)


def test_a_model_without_binarized_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no binarized weights"):
        trainer(tmp_path, [AccuracyOverBER([0])]).test(Project(nn.Linear(12, 3)), loader(), verbose=False)


def logged(callbacks, tmp_path, module=None, data=None, **options):
    run = trainer(tmp_path, callbacks, **options)
    run.test(module or Project(), data or loader(), verbose=False)
    return {name: float(value) for name, value in run.callback_metrics.items()}


def test_accuracies_have_the_names_that_dashboards_hold(tmp_path):
    assert set(logged([AccuracyOverBER([0, 0.01, 0.3], maps=2)], tmp_path)) == {
        "val/loss",
        "test/acc_ber_0",
        "test/acc_ber_0p01",
        "test/acc_ber_0p3",
        "test/tolerable_ber",
        "test/tolerable_ber_is_lower_bound",
    }


def test_rates_that_are_equal_to_six_digits_are_logged_apart(tmp_path):
    callback = AccuracyOverBER([0.3, 0.3000001, 0.5], maps=3)
    found = logged([callback], tmp_path)
    assert found["test/acc_ber_0p3"] == pytest.approx(callback.curve.mean[0])
    assert found["test/acc_ber_0p3000001"] == pytest.approx(callback.curve.mean[1])


def test_two_curves_in_one_run_are_logged_apart(tmp_path):
    """Each is what it is alone, and both are saved."""
    options = {"maps": 2, "save_dir": str(tmp_path / "both")}
    pair = [
        AccuracyOverBER(RATES, **options),
        AccuracyOverBER([0.3], error_model=Chip(0.0, chip=3), name="chip", **options),
    ]
    both = logged(pair, tmp_path)
    first = logged([AccuracyOverBER(RATES, maps=2)], tmp_path)
    second = logged([AccuracyOverBER([0.3], error_model=Chip(0.0, chip=3), maps=2)], tmp_path)
    assert both == first | {
        name.replace("test/", "test/chip_"): value for name, value in second.items() if "ber" in name
    }
    assert first["test/acc_ber_0p3"] != second["test/acc_ber_0p3"]
    files = {path.stem for path in (tmp_path / "both").iterdir()}
    assert files == {"accuracy_over_ber", "chip_accuracy_over_ber"}


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
@pytest.mark.parametrize(
    "options",
    [
        ({}, {}),
        ({"name": "a"}, {"name": "a"}),
        ({}, {"score": MeanSquaredError()}),  # one tolerable BER
        ({"error_model": Independent(0.1)}, {"error_model": Sram65(), "axis": "voltage", "rates": [0.55, 0.5]}),
        ({"save_dir": "x"}, {"save_dir": "x", "axis": "voltage", "rates": [0.55], "error_model": Sram65()}),
    ],
    ids=str,
)
def test_two_that_would_log_under_one_name_are_an_error_at_the_start(tmp_path, stage, options):
    pair = [AccuracyOverBER(**{"rates": RATES, **own}) for own in options]
    with pytest.raises(ValueError, match=r"two AccuracyOverBER would log '.*': give one of them a name="):
        getattr(trainer(tmp_path, pair), stage)(Project(), loader())


def test_one_callback_given_twice_is_such_an_error(tmp_path):
    with pytest.raises(ValueError, match="two AccuracyOverBER would log"):
        trainer(tmp_path, [AccuracyOverBER(RATES)] * 2).test(Project(), loader(), verbose=False)


def test_two_that_share_no_name_need_none(tmp_path):
    pair = [
        AccuracyOverBER([0, 0.1], maps=1),
        AccuracyOverBER([0.55, 0.5], maps=1, axis="voltage", error_model=Sram65()),
    ]
    found = logged(pair, tmp_path)
    assert {"test/acc_ber_0p1", "test/acc_voltage_0p5", "test/tolerable_ber", "test/tolerable_voltage"} <= set(found)


def squared_error(module, batch):
    x, y = batch
    return (module(x) - nn.functional.one_hot(y, 3)).square().sum(), 3 * len(y)


def one_hot(module, batch):
    x, y = batch
    return {"preds": module(x), "target": nn.functional.one_hot(y, 3).float()}


@pytest.mark.parametrize("kind", ["metric", "function"])
def test_another_score_goes_over_ber_as_accuracy_does(tmp_path, kind):
    """At test and at validation, with the numbers of the plain function and its direction."""
    options = {"score": MeanSquaredError(), "predict": one_hot}
    if kind == "function":
        options = {"score": squared_error, "higher_is_better": False}
    name = {"metric": "mean_squared_error", "function": "squared_error"}[kind]
    callback, module = AccuracyOverBER(RATES, maps=2, error_model=Independent(0.2), drop=2.0, **options), Project()
    run = trainer(tmp_path, [callback])
    run.validate(module, loader(), verbose=False)
    faulty = bnnft.accuracy_over_ber(module.net, loader(), [0.2], maps=1, **options)
    assert float(run.callback_metrics[f"val/{name}_faulty"]) == pytest.approx(faulty.mean[0])
    found = logged([callback], tmp_path, module)
    expected = bnnft.accuracy_over_ber(module.net, loader(), RATES, maps=2, **options)
    assert torch.allclose(callback.curve.values, expected.values)
    assert found[f"test/{name}_ber_0p05"] == pytest.approx(expected.mean[1])
    assert found["test/tolerable_ber"] == pytest.approx(expected.tolerable_ber(2.0))
    assert (callback.curve.score, callback.curve.higher_is_better) == (name, False)
    assert "test/acc_ber_0" not in found


def test_a_score_of_unknown_direction_has_no_tolerable_ber(tmp_path):
    found = logged([AccuracyOverBER(RATES, maps=1, score=squared_error)], tmp_path)
    assert "test/squared_error_ber_0p3" in found
    assert not any("tolerable" in name for name in found)


def test_a_tolerable_ber_that_is_a_bound_is_marked(tmp_path):
    module, (x, _) = Project(), loader().dataset.tensors
    data = DataLoader(TensorDataset(x, module.eval()(x).argmax(1)))  # so that flips can only do harm
    for drop, bound in ((1.0, 1.0), (0.0, 0.0)):
        found = logged([AccuracyOverBER(RATES, maps=1, drop=drop)], tmp_path, module, data)
        assert found["test/tolerable_ber_is_lower_bound"] == bound
        assert (found["test/tolerable_ber"] == pytest.approx(0.3)) == bool(bound)


class Regression(Project):
    def validation_step(self, batch, batch_idx):
        self(batch[0])


def test_answers_that_are_no_classes_are_an_error_before_the_first_training_batch(tmp_path):
    """At the sanity check: an epoch of training would be lost where the first validation says so."""
    steps = []
    module = Regression(nn.Sequential(BinaryLinear(12, 1)))
    module.on_train_batch_start = lambda batch, batch_idx: steps.append(batch_idx)
    callback = AccuracyOverBER(RATES, error_model=Independent(0.1))
    with pytest.raises(ValueError, match=r"accuracy needs class scores .* got scores \(8, 1\) .*correct=.*score="):
        trainer(tmp_path, [callback]).fit(module, loader(), loader())
    assert steps == []
    assert callback._measurement.meter is None


def test_the_sanity_check_is_no_measurement(tmp_path):
    callback, seen = AccuracyOverBER(RATES, error_model=Independent(0.2)), []
    module = Project()
    run = trainer(tmp_path, [callback], max_epochs=1)
    module.on_train_start = lambda: seen.append((callback._measurement.meter, dict(run.callback_metrics)))
    run.fit(module, loader(), loader())
    ((meter, metrics),) = seen
    assert meter is None
    assert "val/acc_faulty" not in metrics
    assert "val/acc_faulty" in run.progress_bar_metrics


class NotANumber(Project):
    def forward(self, x):
        return torch.where(torch.arange(len(x))[:, None] < 2, torch.nan, super().forward(x))

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def test_answers_that_are_no_numbers_count_as_wrong_and_are_said_once_in_a_run(tmp_path):
    callback = AccuracyOverBER([0], maps=1, error_model=Independent(0.0))
    run = trainer(tmp_path, [callback], max_epochs=3)
    module = NotANumber()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run.fit(module, loader(), loader())
        run.test(module, loader(), verbose=False)
    assert len([each for each in said if "their highest score is not finite" in str(each.message)]) == 1
    kept = torch.cat([torch.arange(8) >= 2] * 6)
    x, y = loader().dataset.tensors
    assert callback.curve.clean == float(((module.net.eval()(x).argmax(1) == y) & kept).double().mean())


def test_one_callback_starts_afresh_in_each_run(tmp_path):
    """With another network the curve is that of this network, whatever came before, an error included."""
    callback = AccuracyOverBER(RATES, maps=2, error_model=Independent(0.2))
    other = Project(small_net(seed=3))
    alone = AccuracyOverBER(RATES, maps=2)
    expected = logged([alone], tmp_path, other)

    def fail(module, batch):
        raise RuntimeError("stumbled")

    logged([callback], tmp_path)
    first = callback.curve
    callback._score = as_score(correct=fail)
    with pytest.raises(RuntimeError, match="stumbled"):
        logged([callback], tmp_path)
    assert callback._measurement.meter is None
    assert callback.curve is None
    callback._score = as_score()
    found = logged([callback], tmp_path, other)
    assert torch.equal(callback.curve.values, alone.curve.values)
    assert not torch.equal(callback.curve.values, first.values)
    assert found == expected
    trainer(tmp_path, [callback], max_epochs=1).fit(Project(), loader(), loader())
    assert callback.curve is None


def test_a_meter_of_a_run_that_was_interrupted_counts_nowhere(tmp_path):
    """The half of a validation that an error cut off is not part of the next one."""
    module, callback = Project(), AccuracyOverBER(RATES, error_model=Independent(0.2), validation_maps=2)
    run = trainer(tmp_path, [callback])
    fail = iter([False] * 3 + [True])

    class Stumbles(Callback):
        def on_validation_batch_start(self, *args):
            if next(fail, False):
                raise RuntimeError("stumbled")

    run.callbacks.append(Stumbles())
    with pytest.raises(RuntimeError, match="stumbled"):
        run.validate(module, loader(), verbose=False)
    assert callback._measurement.meter is None
    run.validate(module, loader(), verbose=False)
    expected = bnnft.accuracy_over_ber(module.net, loader(), [0.2], maps=2).mean[0]
    assert float(run.callback_metrics["val/acc_faulty"]) == pytest.approx(expected)


def test_a_checkpoint_holds_nothing_that_depends_on_addresses(tmp_path):
    callback = AccuracyOverBER(RATES, correct=lambda module, batch: None, weights=lambda name, weight: True)
    run = trainer(tmp_path, [callback], max_epochs=1, limit_val_batches=0)
    run.fit(Project(), loader())
    run.save_checkpoint(tmp_path / "some.ckpt")
    saved = torch.load(tmp_path / "some.ckpt", weights_only=True)
    assert "AccuracyOverBER" in callback.state_key
    assert "0x" not in str(list(saved["callbacks"])) + callback.state_key


def test_a_logger_of_somebodys_own_takes_a_run(tmp_path):
    mine = Plain()
    logged([AccuracyOverBER(RATES, maps=1, error_model=Chip(0))], tmp_path, logger=mine)
    assert len([row for _, row in mine.rows if "test/acc_over_ber" in row]) == len(RATES)
    assert any("test/tolerable_ber" in row for _, row in mine.rows)


def test_callback_and_function_have_the_same_defaults_as_documented():
    ours, plain = (signature(each).parameters for each in (AccuracyOverBER, bnnft.accuracy_over_ber))
    shared = [name for name in ours if name in plain]
    assert len(shared) == 14
    assert all(ours[name].default == plain[name].default for name in shared)
    assert {name: ours[name].default for name in ("maps", "seed", "drop", "validation_maps", "target")} == {
        "maps": 5,
        "seed": 0,
        "drop": 0.01,
        "validation_maps": 1,
        "target": "weights",
    }


@pytest.mark.parametrize("sanity", [0, 2])
def test_what_can_not_be_measured_any_more_is_left_out_and_the_training_goes_on(tmp_path, sanity):
    """An error of the score itself, from the second epoch on: one warning, and all epochs are trained."""

    def score(module, batch):
        if module.current_epoch >= 1:
            raise RuntimeError("no answer today")
        return module(batch[0]).sum(), len(batch[0])

    callback = AccuracyOverBER(RATES, error_model=Independent(0.2), score=score)
    module, epochs = Project(), []
    module.on_train_epoch_end = lambda: epochs.append(module.current_epoch)
    run = trainer(tmp_path, [callback], max_epochs=4, num_sanity_val_steps=sanity)
    with pytest.warns(UserWarning, match="leaves out val/score_faulty from now on: no answer today") as said:
        run.fit(module, loader(), loader())
    assert epochs == [0, 1, 2, 3]
    assert len([each for each in said if "leaves out" in str(each.message)]) == 1
    with pytest.raises(RuntimeError, match="no answer today"):  # what is asked for is an error where it fails
        run.validate(module, loader(), verbose=False)


def test_patterns_that_match_nothing_are_an_error_before_the_first_training_batch_without_a_sanity_check(tmp_path):
    module, steps = Project(), []
    module.on_train_batch_start = lambda batch, batch_idx: steps.append(batch_idx)
    run = trainer(tmp_path, [AccuracyOverBER(RATES, weights=["net.9"])], num_sanity_val_steps=0)
    with pytest.raises(ValueError, match=r"pattern 'net\.9' matches no parameter"):
        run.fit(module, loader(), loader())
    assert steps == []
