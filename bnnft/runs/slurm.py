"""What Slurm has done with a job, asked where it answers without accounting."""

import os
import re
import shutil
import subprocess
from typing import Any

_QUEUE = ["squeue", "--me", "--array", "--states=all", "--format=%i|%T|%N"]


def is_requeued() -> bool:
    """Return whether Slurm has put the job that this process belongs to into the queue again."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or shutil.which("scontrol") is None:
        return False
    shown = subprocess.run(["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True).stdout
    restarts = re.search(r"\bRestarts=(\d+)", shown)
    return restarts is not None and int(restarts[1]) > int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def watch_queue() -> None:
    """Let submitit ask ``squeue`` for the states of jobs where ``sacct``, for want of accounting, has no answer.

    Without it submitit warns at each look, and waits for ever for a job that was cancelled.
    """
    accounting = shutil.which("sacct")
    if accounting and subprocess.run([accounting, "--noheader", "--jobs=1"], capture_output=True).returncode == 0:
        return
    from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

    class QueueWatcher(SlurmInfoWatcher):  # type: ignore[misc, unused-ignore]
        def _make_command(self) -> list[str] | None:
            return _QUEUE if self._registered - self._finished else None

        def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
            return queue_states(string if isinstance(string, str) else string.decode(), self._registered)

    watcher: Any = QueueWatcher(delay_s=60)
    SlurmJob.watcher = watcher


def queue_states(said: str, jobs: set[str]) -> dict[str, dict[str, str]]:
    r"""Return the state of each job by what ``squeue`` said; one that is no longer listed has ended.

    Example:
        >>> queue_states("JOBID|STATE|NODELIST\n7_0|PENDING|", {"7_0", "7_1"})
        {'7_0': {'State': 'PENDING', 'NodeList': ''}, '7_1': {'State': 'ENDED', 'NodeList': ''}}
    """
    rows = (line.split("|") for line in said.splitlines()[1:])
    listed = {job: {"State": state, "NodeList": nodes} for job, state, nodes in rows}
    return {job: listed.get(job, {"State": "ENDED", "NodeList": ""}) for job in sorted(jobs)}
