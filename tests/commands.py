"""Run the commands that users type, each in a process and a folder of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUICK = ["trainer.max_epochs=2", "model.widths=[64,32]", "callbacks.accuracy_over_ber.maps=2"]


def prepared(folder):
    """Give a folder train.py and conf, and return the environment: W&B stays offline and writes nothing elsewhere."""
    for name in ("train.py", "conf"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    quiet = {"WANDB_MODE": "offline", "WANDB_DATA_DIR": str(folder / "staged"), "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | quiet | {"PYTHONPATH": paths, "COLUMNS": "120"}


def run_script(name, *arguments):
    """Run a script of the tests in a process of its own."""
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "tests" / "foreign"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", ROOT / "tests" / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})


def run(folder, *arguments, **environment):
    """Run train.py."""
    command = [sys.executable, "train.py", *arguments]
    environment = prepared(folder) | environment
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
