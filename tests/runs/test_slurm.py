"""Sweeps on Slurm: their jobs end with the results of jobs that were never cut, whatever Slurm does to them."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from commands import QUICK, prepared, run

from bnnft.runs.slurm import is_requeued, queue_states

JOBS = ["-m", *QUICK, "threads=1", "name=four", "logger=none", "+callbacks.ask._target_=slurm_job.AskSlurm"]
SLURM = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=2"]
SHORT = "hydra.launcher.timeout_min=5"  # so short that submitit takes its signal for the end of the time
ASK = "requeue:seed=1,out of time:seed=2,cancel:seed=3"
LIMIT = 300  # seconds

needs_slurm = pytest.mark.skipif(
    shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True).returncode != 0,
    reason="needs a Slurm that answers",
)


def said(folder, seed, name):
    """Return what the job of a seed has in one of its files."""
    (path,) = (folder / "multirun" / "four").glob(f"*seed={seed}*/{name}")
    return json.loads(path.read_text())


def start_what_waits():
    """Let jobs that were requeued start at once; Slurm gives them two minutes before."""
    listed = subprocess.run(
        ["squeue", "--me", "--array", "--noheader", "--format=%i %T %r"], capture_output=True, text=True
    )
    for job in [line.split()[0] for line in listed.stdout.splitlines() if line.endswith("PENDING BeginTime")]:
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Run a sweep on Slurm; return its folder, how it ended, and the notes of jobs 1 and 2 between cut and restart."""
    folder = tmp_path_factory.mktemp("slurm")
    environment = prepared(folder) | {"ASK_SLURM": ASK}
    command = [sys.executable, "train.py", *JOBS, *SLURM, SHORT, "seed=0,1,2,3"]
    pipe, notes, until = subprocess.PIPE, [], time.monotonic() + LIMIT
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True) as sweep:
        while sweep.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                sweep.wait(0.2)
            assert time.monotonic() < until, "the sweep does not end"
            states = [
                json.loads(path.read_text())
                for path in sorted((folder / "multirun" / "four").glob("*seed=[12]*/job.json"))
            ]
            if len(notes) < 2 and [note["state"] for note in states] == ["requeued", "requeued"]:
                notes = states
            if len(notes) == 2:
                start_what_waits()
        output, errors = sweep.communicate()
    return folder, subprocess.CompletedProcess(command, sweep.returncode, output, errors), notes


@pytest.mark.slurm
@needs_slurm
def test_between_cut_and_restart_a_job_says_requeued(swept):
    _, _, notes = swept
    assert [note["error"] for note in notes] == ["by Slurm", "out of time"]


@pytest.mark.slurm
@needs_slurm
def test_a_job_that_was_requeued_or_ran_out_of_time_ends_as_one_that_was_not_cut(swept, tmp_path):
    folder, _, _ = swept
    done = run(tmp_path, *JOBS, "seed=1,2")
    assert done.returncode == 0, done.stderr[-3000:]
    for seed in (1, 2):
        ours, theirs = (said(each, seed, "metrics.json") for each in (folder, tmp_path))
        assert (ours["metrics"], ours["curve"]) == (theirs["metrics"], theirs["curve"])


@pytest.mark.slurm
@needs_slurm
def test_a_job_that_is_cancelled_ends_its_sweep_after_the_others_without_a_wall_of_warnings(swept):
    folder, done, _ = swept
    assert done.returncode == 1
    table = done.stdout[done.stdout.rindex("4 jobs") :]
    assert (table.count("finished"), table.count("interrupted")) == (3, 1)
    assert said(folder, 3, "job.json")["error"] == "stopped by SIGTERM"
    assert "sacct" not in done.stdout + done.stderr


def test_a_job_that_is_no_longer_in_the_queue_has_ended():
    assert queue_states("JOBID|STATE|NODELIST\n3_1|RUNNING|vm\n9|PENDING|", {"3_1", "4"}) == {
        "3_1": {"State": "RUNNING", "NodeList": "vm"},
        "4": {"State": "ENDED", "NodeList": ""},
    }


@pytest.mark.parametrize(("before", "requeued"), [(None, True), ("0", True), ("1", False)])
def test_a_job_is_requeued_if_slurm_counts_one_start_more_than_it_knows_of(tmp_path, monkeypatch, before, requeued):
    control = tmp_path / "scontrol"
    control.write_text("#!/bin/sh\necho JobId=7 JobState=COMPLETING Requeue=1 Restarts=1 BatchFlag=1\n")
    control.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if before is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", before)
    assert is_requeued() is requeued


def test_outside_of_slurm_nothing_is_requeued(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert not is_requeued()
