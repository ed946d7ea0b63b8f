"""Runs that are asked to end."""

import json
import os
import signal

import pytest
from commands import QUICK, run
from offline_run import read

from bnnft.runs.stopping import StoppedError, stoppable

STOP = "+callbacks.stop._target_=stop_job.Stop"  # does nothing, unless the environment says so
THREE = ["-m", *QUICK, STOP, "threads=1", "name=three", "seed=0,1,2"]


def job(folder, seed):
    (found,) = (folder / "multirun" / "three").glob(f"*seed={seed}*")
    return found


def result(folder, seed):
    content = json.loads((job(folder, seed) / "metrics.json").read_text())
    return content["metrics"], content["curve"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder, *THREE[:-1], "seed=1")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_a_signal_ends_a_sweep_with_a_checkpoint_and_the_same_command_goes_on(whole, tmp_path):
    """The exit code is that of SIGTERM; job, table and W&B say why; the result is that of an uncut run."""
    done = run(tmp_path, *THREE, STOP_JOB="SIGUSR1:seed=1")
    assert done.returncode == 143
    assert "train.py was stopped by SIGUSR1" in done.stderr
    table = done.stdout[done.stdout.rindex("3 jobs") :]
    assert all(table.count(state) == 1 for state in ("finished", "interrupted", "not run"))
    noted = json.loads((job(tmp_path, 1) / "job.json").read_text())
    assert (noted["state"], noted["error"]) == ("interrupted", "stopped by SIGUSR1")
    tracked = [read(path) for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert sorted(each["exit"] for each in tracked) == [0, 143]
    assert [each["summary"]["error"] for each in tracked if each["exit"]] == ["stopped by SIGUSR1"]
    done = run(tmp_path, *THREE[:-1], "seed=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Restored all states from the checkpoint" in done.stderr + done.stdout
    assert result(tmp_path, 1) == result(whole, 1)


def test_ctrl_c_says_that_it_interrupted(tmp_path):
    done = run(tmp_path, *THREE, "logger=none", STOP_JOB="SIGINT:seed=0")
    assert done.returncode == 130
    assert "train.py was interrupted" in done.stderr
    assert "SystemExit" not in done.stderr
    assert json.loads((job(tmp_path, 0) / "job.json").read_text())["error"] == "interrupted"
    assert done.stdout[done.stdout.rindex("3 jobs") :].count("not run") == 2


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_outside_of_a_trainer_a_signal_ends_a_run_at_once(name):
    before = signal.getsignal(signal.Signals[name])
    with pytest.raises(StoppedError, match=f"stopped by {name}") as caught, stoppable():  # noqa: PT012
        os.kill(os.getpid(), signal.Signals[name])
        signal.pause()
    assert caught.value.code == 143
    assert signal.getsignal(signal.Signals[name]) is before


def test_under_slurm_lightning_puts_the_job_into_the_queue_again(monkeypatch):
    """It does so only where nobody else handles the signal."""
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "bnnft")
    with stoppable():
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_other_errors_stay_what_they_are():
    with pytest.raises(ValueError, match="why"), stoppable():
        raise ValueError("why")
    with pytest.raises(SystemExit) as caught, stoppable():
        raise SystemExit(3)
    assert caught.value.code == 3
