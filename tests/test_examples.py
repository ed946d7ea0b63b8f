import csv
from pathlib import Path

import torch
from commands import Started

EXAMPLE = Path(__file__).parents[1] / "examples" / "drop_in"


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
