import csv
import itertools
import os
from pathlib import Path

import hydra
import pytest
import torch
from commands import Started

from bnnft.ber import Chip

EXAMPLES = Path(__file__).parents[1] / "examples"
EXAMPLE = EXAMPLES / "drop_in"
HYDRA = EXAMPLES / "hydra_project"


def run(folder, command, *more):
    program = [EXAMPLE / "project.py", command, "--config", EXAMPLE / "config.yaml"]
    done = Started(*program, "--trainer.enable_progress_bar=false", *more, cwd=folder).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_the_command_line_of_a_project_takes_the_callbacks_from_yaml(tmp_path):
    """Layers nobody knows are found, flips go in, margins and curves come out, and the checkpoint is the project's."""
    said = run(tmp_path, "fit", "--trainer.max_epochs=2")
    assert "on 81,920 bits in net.0.weight (found, made), net.3.weight (found, made)" in said
    (log,) = tmp_path.rglob("metrics.csv")
    last = [row for row in csv.DictReader(log.read_text().splitlines()) if row["val_acc"]][-1]
    assert float(last["val_acc"]) > 0.7
    assert float(last["val/acc_faulty"]) > 0.7
    assert float(last["val/margin/0"]) > 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    keys = torch.load(checkpoint, weights_only=True)["state_dict"].keys()
    assert [key for key in keys if key.startswith("net.0")] == ["net.0.weight"]
    said = run(tmp_path, "test", "--ckpt_path", checkpoint)
    assert "test/acc_ber_0p01" in said
    assert "test/tolerable_ber" in said


ERRORS = """
trainer:
  callbacks:
    - class_path: bnnft.callbacks.BitFlipTraining
      init_args:
        error_model:
          class_path: bnnft.ber.PerLayer
          init_args:
            rates:
              "*net.0*": {class_path: bnnft.ber.Asymmetric, init_args: {rate_0_to_1: 0.1, rate_1_to_0: 0}}
              "*": 0.05
        schedule:
          class_path: bnnft.ber.Curriculum
          init_args: {loss_below: 1.0, then: {class_path: bnnft.ber.Steps, init_args: {factors: {0: 0.5, 10: 1.0}}}}
        gradient: average
    - class_path: bnnft.callbacks.AccuracyOverBER
      init_args:
        rates: [0.55, 0.52, 0.5]
        axis: voltage
        error_model: {class_path: bnnft.ber.Sram65, init_args: {chip: null}}
"""


def test_the_command_line_takes_every_kind_of_error_from_yaml(tmp_path):
    (tmp_path / "errors.yaml").write_text(ERRORS)
    said = run(tmp_path, "fit", "--config", tmp_path / "errors.yaml", "--trainer.max_epochs=2")
    assert "PerLayer(rates={'*net.0*': Asymmetric(rate_0_to_1=0.1, rate_1_to_0=0.0), '*': 0.05}, scale=1.0) on" in said
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    said = run(tmp_path, "test", "--config", tmp_path / "errors.yaml", "--ckpt_path", checkpoint)
    assert "Sram65(voltage=0.55, chip=None): bit error rate 0.23 %, from Sun et al." in said
    for name in ("test/acc_voltage_0p55", "test/acc_voltage_0p5", "test/tolerable_voltage"):
        assert name in said


def run_hydra(folder, *arguments):
    done = Started(HYDRA / "project.py", *arguments, cwd=folder).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_hydra_project_takes_the_groups_and_runs_once_more_from_its_pickle(tmp_path):
    said = run_hydra(tmp_path, "-m", "ber=independent,chip", "max_epochs=1", "width=32")
    for job in ("0", "1"):
        (folder,) = tmp_path.glob(f"multirun/*/*/{job}")
        assert (folder / "accuracy_over_ber.csv").is_file()
    again = run_hydra(tmp_path, "--experimental-rerun", folder / ".hydra" / "config.pickle")
    numbers = [line for line in again.splitlines() if "acc" in line or "tolerable" in line]
    assert len(numbers) > 5
    assert set(numbers) <= set(said.splitlines())


NOTEBOOK = """
import hydra
from project import train
with hydra.initialize_config_dir({folder!r}, version_base="1.3"):
    config = hydra.compose("project", ["ber=chip", "output_dir=null", "max_epochs=1", "width=32"])
print(train(config)["test/acc_ber_0"])
"""


def test_the_configuration_of_a_hydra_project_can_be_composed_in_a_notebook(tmp_path):
    (tmp_path / "notebook.py").write_text(NOTEBOOK.format(folder=str(HYDRA / "config")))
    done = Started("notebook.py", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(HYDRA)}).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0.2 < float(done.stdout.splitlines()[-1]) <= 1
    assert not any(tmp_path.rglob("*.csv"))


@pytest.mark.parametrize(
    "first", list(itertools.permutations(["_self_", "ber: chip", "ber_schedule: cosine"])), ids=str
)
def test_groups_compose_in_any_order_and_without_any_key_of_the_root(first, tmp_path):
    groups = "".join(f"  - {entry}\n" for entry in (*first, "callbacks: default"))
    (tmp_path / "project.yaml").write_text(
        f"defaults:\n{groups}hydra: {{searchpath: [file://{EXAMPLES.parent}/conf]}}\n"
    )
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        config = hydra.compose("project", ["ber.rate=0.2"])
    built = {name: hydra.utils.instantiate(entry) for name, entry in config.callbacks.items()}
    assert built["bit_flip_training"].error_model == Chip(0.2, chip=0)
    assert built["accuracy_over_ber"].state_key
