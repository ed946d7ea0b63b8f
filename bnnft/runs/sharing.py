"""Let runs share folders: a single run takes one that is free, and several processes share the jobs of one sweep."""

import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, run_job
from hydra.experimental.callback import Callback
from hydra.experimental.callbacks import LogJobReturnCallback
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from bnnft.runs.claim import FolderTakenError, claim, is_first_process
from bnnft.runs.job import read_job
from bnnft.runs.results import overrides_of
from bnnft.runs.slurm import watch_queue

POLL = 1.0  # seconds between two looks at a job that another process runs


class SharedFolders(Callback):
    """Hydra callback: claims the folder of a single run, and postpones the jobs of a sweep that others run.

    A sweep that runs its jobs one after the other comes back to the postponed ones at its end: it waits for each, and
    runs those that a process left when it died. Where jobs run in other processes, or where a search needs each value
    before it goes on, a job waits for its folder.
    """

    def __init__(self) -> None:
        self._last: int | None = None  # number of the last job, where this process runs them all in turn
        self._postponed: list[DictConfig] = []
        self._task: TaskFunction | None = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Claim a folder that no other run has."""
        if is_first_process():
            typed: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
            config.hydra.run.dir = str(free_folder(Path(config.hydra.run.dir), [str(each) for each in typed]))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """See whether this process runs all jobs, in an order that is free."""
        parts = (OmegaConf.select(config, f"hydra.{part}._target_", default="") for part in ("launcher", "sweeper"))
        if all(str(part).rpartition(".")[2].startswith("Basic") for part in parts):
            from bnnft.runs.sweep import sweep_size

            self._last = (sweep_size(config) or 0) - 1
        if str(OmegaConf.select(config, "hydra.launcher._target_", default="")).endswith("SlurmLauncher"):
            watch_queue()

    def on_job_start(self, config: DictConfig, *, task_function: TaskFunction, **kwargs: Any) -> None:
        """Wait for the folder of a job, unless it can be postponed."""
        self._task = task_function
        if self._last is None and _of_sweep(config) and is_first_process():
            wait(Path(config.hydra.runtime.output_dir))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Postpone a job that another process runs; after the last one, come back to those."""
        if self._last is None:
            return
        if is_taken(job_return):
            print(f"{job_return._return_value}: postponed", flush=True)
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None
            self._postponed.append(config)
        if config.hydra.job.num != self._last:
            return
        for later in self._postponed:
            done = self._come_back(later)
            if done.status == JobStatus.FAILED and job_return.status != JobStatus.FAILED:
                # of the last one, since the sweep has passed by those of the postponed ones
                job_return.status, job_return.return_value = done.status, done._return_value

    def _come_back(self, config: DictConfig) -> JobReturn:
        """Wait for a postponed job, and run it if it was left without an end."""
        from hydra._internal.callbacks import Callbacks

        folder = Path(config.hydra.runtime.output_dir)
        wait(folder)
        if (job := read_job(folder)).state == "failed":
            claim(folder).release()
            return JobReturn(status=JobStatus.FAILED, _return_value=RuntimeError(f"{folder}: {job.error}"))
        assert self._task is not None
        context = HydraContext(config_loader=None, callbacks=Callbacks(config))  # type: ignore[arg-type]
        return run_job(self._task, config, "hydra.sweep.dir", "hydra.sweep.subdir", context)


class LogJobReturn(LogJobReturnCallback):
    """Hydra callback: what a job returned, or its traceback, into its log; nothing into that of another process."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Log it."""
        if not is_taken(job_return):
            super().on_job_end(config, job_return, **kwargs)


def is_taken(job_return: JobReturn) -> bool:
    """Return whether a job did not run since another process runs it."""
    return isinstance(job_return._return_value, FolderTakenError)


def free_folder(folder: Path, overrides: list[str]) -> Path:
    """Claim a folder, or the first of ``FOLDER_1``, ``FOLDER_2``, ... that no other run has.

    A folder that a run with the same settings left is taken again: it goes on there.
    """
    for number in count():
        candidate = folder.with_name(f"{folder.name}_{number}") if number else folder
        with suppress(FolderTakenError):
            own = claim(candidate)
            if not (candidate / ".hydra").exists() or list(overrides_of(candidate)) == overrides:
                return candidate
            own.release()
    raise AssertionError


def wait(folder: Path) -> None:
    """Claim a folder as soon as no other process has it, and say for whom it waits."""
    said = None
    while True:
        try:
            claim(folder)
            return
        except FolderTakenError as taken:
            if taken.owner != said:
                print(f"{taken}: waits for it", flush=True)
            said = taken.owner
            time.sleep(POLL)


def _of_sweep(config: DictConfig) -> bool:
    return config.hydra.mode is not None and config.hydra.mode.name == "MULTIRUN"
