"""What answers before torch is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLOW = "('torch', 'lightning', 'wandb', 'torchmetrics', 'matplotlib', 'sklearn')"
AT_THE_END = f"""
import atexit, json, sys
atexit.register(lambda: print(json.dumps([name for name in {SLOW} if name in sys.modules]), file=sys.stderr))
"""
TRAIN = AT_THE_END + "import runpy; sys.argv[0] = 'train.py'; runpy.run_path({path!r}, run_name='__main__')"


def answered(folder, *arguments, **environment):
    """Run train.py in a new process; returns its exit code, what it said, and the slow libraries that it imported."""
    code = TRAIN.format(path=str(ROOT / "train.py"))
    where = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, env=where
    )
    *said, loaded = done.stderr.splitlines()
    return done.returncode, done.stdout + "\n".join(said), json.loads(loaded)


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["--info", "defaults"]], ids=lambda each: each[0])
def test_questions_are_answered_without_the_slow_libraries(arguments, tmp_path):
    code, said, loaded = answered(tmp_path, *arguments)
    assert (code, loaded) == (0, [])
    assert "ber" in said


@pytest.mark.parametrize("wrong", ["ber.rte=0.1", "model=fcc", "callbacks.nothing.seed=1"])
def test_a_typo_is_named_without_the_slow_libraries(wrong, tmp_path):
    code, said, loaded = answered(tmp_path, wrong)
    assert (code, loaded) == (1, [])
    assert wrong.split("=")[0].split(".")[-1] in said
    assert list(tmp_path.iterdir()) == []


def test_completion_answers_without_the_slow_libraries(tmp_path):
    line = {"COMP_LINE": "python train.py model=", "COMP_POINT": "22"}
    code, said, loaded = answered(tmp_path, "-sc", "query=bash", **line)
    assert (code, loaded) == (0, [])
    assert {"model=fc", "model=vgg3"} <= set(said.split())
