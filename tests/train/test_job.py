"""The command that users type, as a process of its own."""

import json

import pytest
from commands import QUICK, run
from offline_run import column, read, table

from bnnft.report.__main__ import main


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    done = run(folder, *QUICK, "name=first")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_a_run_ends_with_its_results_and_where_they_are(single):
    folder, done = single
    assert "clean accuracy" in done.stdout
    assert "importance CV" in done.stdout
    (output,) = (folder / "outputs").glob("*/*")
    for part in ("checkpoints/best.ckpt", "accuracy_over_ber.svg", "accuracy_over_ber.csv", "metrics.json"):
        assert (output / part).is_file()
    for place in ("checkpoint: ", "results and figures: ", "W&B run: "):
        assert place in done.stdout
    assert "warn" not in (done.stderr + done.stdout).lower()


def test_the_offline_run_holds_everything(single):
    """Config, curve with its own x axis, table, figure, histograms, scalars and the state of the run."""
    folder, _ = single
    (directory,) = (folder / "wandb").glob("offline-run-*")
    tracked = read(directory)
    (output,) = (folder / "outputs").glob("*/*")
    result = json.loads((output / "metrics.json").read_text())
    assert tracked["exit"] == 0
    assert tracked["group"] == "first"
    assert tracked["tags"] == ["fc", "digits", "independent"]
    assert tracked["config"]["ber"] == {"_target_": "bnnft.ber.Independent", "rate": 0.1}
    assert tracked["config"]["model"]["widths"] == [64, 32]
    assert column(tracked, "ber") == result["curve"]["rates"]
    means = [sum(maps) / len(maps) for maps in result["curve"]["accuracy"]]
    assert column(tracked, "test/acc_over_ber") == pytest.approx(means)
    assert tracked["metrics"]["test/acc_over_ber"] == "ber"
    rows = table(tracked, "test/ber_table")
    assert rows["columns"][:2] == ["ber", "accuracy"]
    assert [row[1] for row in rows["data"]] == pytest.approx(means)
    assert (tracked["dir"] / "files" / tracked["summary"]["test/ber_figure.filenames"][0]).stat().st_size > 5000
    neurons = table(tracked, "test/neuron_importance")
    assert neurons["columns"] == ["layer", "neuron", "neuron_importance"]
    assert [row[0] for row in neurons["data"]] == ["fc1"] * 64 + ["fc2"] * 32
    importance = [row[2] for row in neurons["data"][:64]]
    assert sum(importance) / 64 == pytest.approx(result["metrics"]["test/importance/fc1"], rel=1e-5)
    assert tracked["config"]["choices"] == {
        "model": "fc",
        "dataset": "digits",
        "ber": "independent",
        "loss": "cross_entropy",
        "compensation": "none",
    }
    assert column(tracked, "val/margin_histogram/fc1._type") == ["histogram"] * 2
    counts, edges = (column(tracked, f"val/margin_histogram/fc1.{part}")[0] for part in ("values", "bins"))
    assert sum(counts) == 180 * 64
    assert len(edges) == len(counts) + 1
    for name in ("test/tolerable_ber", "test/acc_ber_0p1", "val/importance_cv/fc2", "train/loss"):
        assert column(tracked, name)


def test_the_checkpoint_loads_into_the_plain_network(single):
    import torch

    from bnnft.model import FC

    folder, _ = single
    (path,) = (folder / "outputs").glob("*/*/checkpoints/best.ckpt")
    saved = torch.load(path, weights_only=True)["state_dict"]
    network = FC((1, 8, 8), 10, widths=[64, 32])
    network.load_state_dict({name.removeprefix("model."): value for name, value in saved.items()})


@pytest.mark.parametrize("logger", ["csv", "tensorboard", "many", "none"])
def test_every_logger_takes_a_run(tmp_path, logger):
    done = run(tmp_path, *QUICK, f"logger={logger}", "ber=none")
    assert done.returncode == 0, done.stderr[-3000:]
    (output,) = (tmp_path / "outputs").glob("*/*")
    if logger in ("csv", "many"):
        header, *rows = (output / "csv" / "metrics.csv").read_text().splitlines()
        place = header.split(",").index("test/acc_over_ber")
        assert len([row for row in rows if row.split(",")[place]]) == 7
    if logger in ("tensorboard", "many"):
        assert list((output / "tensorboard").glob("events.*"))
    assert (tmp_path / "wandb").exists() == (logger == "many")
    assert (output / "metrics.json").is_file()


def test_a_failed_job_says_why_last_and_is_tracked_as_failed(tmp_path):
    done = run(tmp_path, *QUICK, "optimizer.lr=-1")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "train.py failed: ValueError: Invalid learning rate: -1"
    (directory,) = (tmp_path / "wandb").glob("offline-run-*")
    assert read(directory)["exit"] == 1


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("ber.rate=1.5", "ValueError: rate must be a fraction in [0, 1], got 1.5"),
        ("ber.rate=high", "TypeError: rate must be a fraction in [0, 1], got 'high'"),
        ("seed=-1", "-1"),
        ("callbacks.accuracy_over_ber.maps=0", "ValueError: maps must be an integer >= 1, got 0"),
        ("callbacks.accuracy_over_ber.rates=[]", "ValueError: rates must be a list of one or more"),
        ("callbacks.bit_flip_training.weights=[fc9]", "the pattern 'fc9' matches no parameter"),
    ],
)
def test_a_bad_value_is_named_in_the_last_line(tmp_path, argument, says):
    done = run(tmp_path, *QUICK, argument, "logger=none")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("train.py failed: ")
    assert says in last


def test_an_unknown_choice_is_hydras_own_error(tmp_path):
    done = run(tmp_path, "ber=cosmic")
    assert done.returncode == 1
    assert "Could not find 'ber/cosmic'" in done.stderr
    assert "independent" in done.stderr


def test_help_shows_groups_and_commands_worth_copying(tmp_path):
    page = run(tmp_path, "--help", anew=True).stdout
    assert "dataset: digits, fashion_mnist" in page
    assert page.count("\n  python train.py") == 8
    assert page.count("\n  python -m bnnft.report") == 1


def test_a_value_for_the_sweeper_is_returned(tmp_path):
    done = run(tmp_path, *QUICK, "logger=none", "optimized_metric=test/tolerable_ber")
    (output,) = (tmp_path / "outputs").glob("*/*")
    value = json.loads((output / "metrics.json").read_text())["metrics"]["test/tolerable_ber"]
    assert f"Succeeded with return value: {value}" in (output / "train.log").read_text()
    assert done.returncode == 0


def test_both_curves_of_a_run_reach_results_and_report(tmp_path):
    """The second one under its name: in the terminal, the files of the run, W&B and the report."""
    chip = "_target_: bnnft.callbacks.AccuracyOverBER, rates: [0.1, 0.3], maps: 2, name: chip"
    done = run(tmp_path, *QUICK, f"+callbacks.chip={{{chip}, save_dir: '${{hydra:runtime.output_dir}}'}}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "chip: clean accuracy" in done.stdout
    (output,) = (tmp_path / "outputs").glob("*/*")
    result = json.loads((output / "metrics.json").read_text())
    (further,) = result["further_curves"]
    assert (result["curve"]["name"], further["name"], further["rates"]) == ("", "chip", [0.1, 0.3])
    means = [sum(maps) / len(maps) for maps in further["accuracy"]]
    assert result["metrics"]["test/chip_acc_ber_0p3"] == pytest.approx(means[1])
    assert (output / "chip_accuracy_over_ber.csv").is_file()
    tracked = read(next((tmp_path / "wandb").glob("offline-run-*")))
    assert column(tracked, "test/chip_acc_over_ber") == pytest.approx(means)
    assert tracked["metrics"]["test/chip_acc_over_ber"] == "ber"
    assert main([str(output)]) == 0
    assert "## chip" in (output / "report.md").read_text()
    assert (output / "chip_acc_over_ber.svg").is_file()
