import csv
import subprocess
import sys
from pathlib import Path

import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "drop_in"


def run(folder, command, *more):
    program = [sys.executable, EXAMPLE / "project.py", command, "--config", EXAMPLE / "config.yaml"]
    quiet = "--trainer.enable_progress_bar=false"
    done = subprocess.run([*program, quiet, *more], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_the_command_line_of_a_project_takes_the_callbacks_from_yaml(tmp_path):
    """Layers nobody knows are found, flips go in, margins and curves come out, and the checkpoint is the project's."""
    said = run(tmp_path, "fit", "--trainer.max_epochs=2")
    assert "on 81,920 bits in net.0.weight (found by sign, latent), net.3.weight (found by sign, latent)" in said
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
