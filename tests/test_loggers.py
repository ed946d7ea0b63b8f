import csv
import gc
import math
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from recorded import Experiment, Plain, Tables, WithExperiment

from bnnft import BERCurve
from bnnft.ber import Independent, Sram65
from bnnft.loggers import (
    announce,
    curve_table,
    log_curve,
    log_histograms,
    log_neurons,
    save_curve,
    say_once,
    short_names,
)
from bnnft.metrics import Histogram

LAYERS = ["a", "b", "a.b", "a_b", "a-b", "a.b.c", "a_b.c", "a.b_c", "a_b_c", "a-b.c", "a.-b", "a-.b"]


@pytest.mark.parametrize("rest", [LAYERS[:2], LAYERS[2:5], LAYERS[5:9], LAYERS, LAYERS[::-1]], ids=str)
@pytest.mark.parametrize("prefix", ["", "model.net."])
def test_layers_have_short_names_of_their_own_without_dots(rest, prefix):
    names = short_names([prefix + layer for layer in rest])
    assert list(names) == [prefix + layer for layer in rest]
    assert len(set(names.values())) == len(rest)
    assert not any("." in name or "=" in name or "/" in name for name in names.values())


def test_the_usual_names_are_plain_and_those_that_would_collide_are_told_apart():
    assert short_names(["model.fc1", "model.block.fc"]) == {"model.fc1": "fc1", "model.block.fc": "block_fc"}
    assert short_names(["fc.weight"]) == {"fc.weight": "weight"}
    assert short_names(["block.fc", "block_fc"]) == {"block.fc": "block-fc", "block_fc": "block_fc"}
    assert short_names([]) == {}


def trainer(*loggers):
    return SimpleNamespace(loggers=list(loggers), global_step=7)


CURVE = BERCurve((0, 0.1), [[0.9, 0.9], [0.5, 0.7]], clean=0.9)


def test_a_logger_without_an_experiment_gets_the_rows_of_a_curve():
    mine = Plain()
    log_curve(trainer(mine), "test", CURVE)
    assert mine.rows == [
        (0, {"ber": 0.0, "test/acc_over_ber": 0.9}),
        (1, {"ber": 0.1, "test/acc_over_ber": pytest.approx(0.6)}),
    ]
    log_histograms(trainer(mine), {"a": Histogram(torch.ones(2), torch.arange(3.0))})
    log_neurons(trainer(mine), "test", {"importance": {"fc": torch.ones(2)}})
    assert len(mine.rows) == 2


def test_a_curve_has_an_x_axis_of_its_own_in_wandb():
    wandb = WithExperiment("define_metric", "finish")
    log_curve(trainer(wandb), "test", CURVE)
    defined = [(args, kwargs.get("step_metric")) for _, args, kwargs in wandb.experiment.calls]
    assert defined == [(("ber",), None), (("test/acc_over_ber",), "ber")]
    assert [step for step, _ in wandb.rows] == [None, None]
    assert wandb.tables["test/ber_table"][1][1][:2] == [0.1, pytest.approx(0.6)]
    assert len(wandb.images["test/ber_figure"]) == 1


def test_a_second_curve_of_a_name_is_another_line_in_wandb():
    wandb = WithExperiment("define_metric", "finish")
    for _ in range(2):
        log_curve(trainer(wandb), "test", CURVE)
    keys = [key for _, row in wandb.rows for key in row if key != "ber"]
    assert keys == ["test/acc_over_ber"] * 2 + ["test/acc_over_ber_2"] * 2
    assert [args[0] for _, args, _ in wandb.experiment.calls][-1] == "test/acc_over_ber_2"


def test_rows_of_a_curve_in_a_csv_have_the_step_of_the_run(tmp_path):
    logger = CSVLogger(tmp_path)
    log_curve(trainer(logger), "test", CURVE)
    logger.save()
    rows = list(csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines()))
    assert [(row["ber"], row["step"]) for row in rows] == [("0.0", "7"), ("0.1", "7")]
    assert [float(row["test/acc_over_ber"]) for row in rows] == pytest.approx([0.9, 0.6])


def test_tensorboard_gets_the_figure_alone():
    board = Plain()
    board.experiment = Experiment("add_figure", "add_histogram_raw")
    log_curve(trainer(board), "test", CURVE)
    assert [(method, args[0]) for method, args, _ in board.experiment.calls] == [("add_figure", "test/ber_figure")]
    assert board.rows == []


def test_a_curve_of_another_score_and_name_is_logged_as_such():
    mine = Tables()
    log_curve(trainer(mine), "test", BERCurve((1, 2), [[2.0], [3.0]], 1.0, "scale", "loss", False, name="mine"))
    assert [row for _, row in mine.rows] == [
        {"scale": 1.0, "test/mine_loss_over_scale": 2.0},
        {"scale": 2.0, "test/mine_loss_over_scale": 3.0},
    ]
    columns, rows = mine.tables["test/mine_scale_table"]
    assert columns == ["scale", "loss", "std", "low", "high", "higher_is_better", "map_0"]
    assert rows[0] == [1.0, 2.0, None, None, None, False, 2.0]
    assert list(mine.images) == ["test/mine_scale_figure"]


def test_the_table_of_a_curve_holds_its_numbers():
    columns, rows = curve_table(CURVE)
    assert columns == ["ber", "accuracy", "std", "low", "high", "higher_is_better", "map_0", "map_1"]
    for row, rate, mean, std, interval, values in zip(
        rows, CURVE.rates, CURVE.mean, CURVE.std, CURVE.interval, CURVE.values.tolist(), strict=True
    ):
        assert row == [rate, mean, std, *interval, True, *values]
    unknown = BERCurve((0,), [[math.nan]], 1.0, score="loss", higher_is_better=None)
    assert curve_table(unknown)[1] == [[0.0, None, None, None, None, None, None]]


def test_two_curves_are_saved_side_by_side(tmp_path):
    for name, score in product(("", "chip"), ("accuracy", "loss")):
        save_curve(BERCurve((0, 0.1), [[0.9], [0.5]], 0.9, score=score, name=name), tmp_path / "new")
    stems = {"accuracy_over_ber", "loss_over_ber", "chip_accuracy_over_ber", "chip_loss_over_ber"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        f"{stem}.{suffix}" for stem in stems for suffix in ("csv", "png", "svg")
    }
    with (tmp_path / "new" / "chip_loss_over_ber.csv").open() as file:
        assert [row["loss"] for row in csv.DictReader(file)] == ["0.9", "0.5"]


def test_a_source_is_said_once_for_each_trainer_and_logged(caplog):
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    said, runs = [], [Trainer(logger=False, enable_checkpointing=False, accelerator="cpu") for _ in range(2)]
    for run in runs:
        run.loggers = [Plain()]
        for _ in range(2):
            announce(run, Sram65(0.5))
            announce(run, Independent(0.1))  # has no source
        (settings,) = run.loggers[0].settings
        assert settings["error_model"]["rate"] == pytest.approx(0.0156)
        assert "Sun et al." in settings["error_model"]["source"]
        assert say_once(run, "key", "text", said.append)
        assert not say_once(run, "key", "text", said.append)
    assert said == ["text", "text"]
    spoken = [message for message in caplog.messages if "Sun et al." in message]
    assert len(spoken) == 2
    assert all("Sram65(voltage=0.5" in message and "bit error rate 1.56 %, from " in message for message in spoken)


def test_what_was_said_keeps_no_trainer_alive():
    run = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    say_once(run, "key", "text", len)
    from bnnft.loggers import _said

    assert run in _said
    count = len(_said)
    del run
    gc.collect()
    assert len(_said) < count


def test_histograms_keep_their_bins_in_wandb_and_tensorboard():
    histogram = Histogram(torch.tensor([1, 3, 0]), torch.tensor([0.0, 2.0, 4.0, 6.0]))
    wandb, board = WithExperiment("define_metric"), WithExperiment("add_histogram_raw")
    log_histograms(trainer(wandb, board), {"val/margin_histogram/fc": histogram})
    ((step, row),) = wandb.rows
    shown = histogram.trimmed(64)
    assert step == 7
    assert row["val/margin_histogram/fc"] == {
        "_type": "histogram",
        "values": shown.counts.tolist(),
        "bins": shown.edges.tolist(),
    }
    ((_, (key,), numbers),) = board.experiment.calls
    assert (key, numbers["num"], numbers["global_step"]) == ("val/margin_histogram/fc", 4, 7)
    assert (numbers["sum"], numbers["sum_squares"]) == (1 * 1 + 3 * 3, 1 * 1 + 3 * 9)
    assert (numbers["min"], numbers["max"]) == (float(shown.edges[0]), float(shown.edges[-1]))
    assert (numbers["bucket_limits"], numbers["bucket_counts"]) == (shown.edges[1:].tolist(), shown.counts.tolist())


def test_values_of_neurons_are_a_table_for_each_metric():
    mine = Tables()
    log_neurons(trainer(mine), "test", {"importance": {"fc1": torch.tensor([1.0, 2.0]), "fc2": torch.tensor([3.0])}})
    assert mine.tables == {
        "test/importance": (["layer", "neuron", "importance"], [["fc1", 0, 1.0], ["fc1", 1, 2.0], ["fc2", 0, 3.0]])
    }
