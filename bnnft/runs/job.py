"""What a run notes in its folder from its start on, ``job.json``, and the states of all runs of a sweep."""

import atexit
import secrets
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bnnft.runs.claim import claimed, owner_of
from bnnft.runs.identity import identity
from bnnft.runs.results import RESULT, Result, overrides_of, read_json, read_result, write_json
from bnnft.runs.stopping import StoppedError

JOB = "job.json"
State = Literal["finished", "failed", "interrupted", "requeued", "running", "unfinished", "not run"]


@dataclass(frozen=True)
class Job:
    """One run of a sweep, in whatever state it is.

    Attributes:
        folder: where it runs or ran.
        state: ``"running"`` if a process owns it, ``"unfinished"`` if it was cut without a word.
        overrides: the settings of its command line.
        result: what it left, if it is finished.
        error: why it failed, or who runs it.
        sweep: name of the folder that was asked for.
    """

    folder: Path
    state: State
    overrides: tuple[str, ...] = ()
    result: Result | None = None
    error: str = ""
    sweep: str = ""


@contextmanager
def running(folder: Path, config: Mapping[str, Any]) -> Iterator[Result | None]:
    """Own a folder while a job runs there, and take note of how it ends; gives the result of one that ended before.

    Why it failed is said when the process ends, after all tracebacks, so that it is what the eye falls on.

    Raises:
        FolderTakenError: another process runs it.
    """
    with claimed(folder) as own:
        try:
            yield begin_job(folder, config)
        except BaseException as error:
            lost = own is not None and own.lost
            said = f"{folder} was taken over by {owner_of(folder)}" if lost else fail_job(folder, error)
            atexit.register(lambda: print(said, file=sys.stderr))
            if isinstance(error, StoppedError) and error.hand_over is not None:
                _hand_over(folder, error.hand_over)
            raise


def _hand_over(folder: Path, requeue: Callable[[], None]) -> None:
    try:
        requeue()
    except Exception as error:  # as after too many starts: the job ends here
        fail_job(folder, error)
        raise


def begin_job(folder: Path, config: Mapping[str, Any]) -> Result | None:
    """Return the result of an earlier run with the same config, or take note that one starts.

    A checkpoint to go on from is kept for a config that is the same, and removed for another one.
    """
    own = identity(config, folder)
    if (read_json(folder / RESULT) or {}).get("identity") == own:
        with suppress(ValueError):  # a result that can't be read is made again
            return read_result(folder)
    before = read_json(folder / JOB)
    if (before or {}).get("identity") != own:
        last_checkpoint(folder).unlink(missing_ok=True)
        before = None
    run, starts = _run_in(before)
    note = {"identity": own, "state": "unfinished", "error": "", "run": run, "starts": starts + 1}
    write_json(folder / JOB, note)
    return None


def run_of(folder: Path) -> tuple[str, int]:
    """Return the id of a job's run in W&B, and how often the job was started."""
    return _run_in(read_json(folder / JOB))


def _run_in(note: Any) -> tuple[str, int]:
    match note:
        case {"run": str(run), "starts": int(starts)}:
            return run, starts
    return secrets.token_hex(4), 0


def last_checkpoint(folder: Path) -> Path:
    """Return where a run keeps the checkpoint to go on from."""
    return folder / "checkpoints" / "last.ckpt"


def whole_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint to go on from, ``None`` to start; says so where one was cut or is empty.

    The best one counts where the last one is cut. It is what is tested in the end, so that nothing counts without it.
    """
    last = last_checkpoint(folder)
    if not last.exists():
        return None
    best = last.with_name("best.ckpt")
    cut = [path for path in (best, last) if path.exists() and not _is_whole(path)]
    if not cut:
        return last
    found = best if best.exists() and best not in cut else None
    names, goes_on = " and ".join(map(str, cut)), f"goes on from {best}" if found else "starts again"
    print(f"{names} cut or empty: the run {goes_on}", flush=True)
    return found


def _is_whole(path: Path) -> bool:
    """Return whether all parts of a file of :func:`torch.save` have their checksums."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile, zlib.error):
        return False


def reason_of(error: BaseException) -> str:
    """Return why a run ended: the cause, where Hydra could not build a part of the config."""
    while type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        error = error.__cause__
    return str(error) if isinstance(error, StoppedError) else f"{type(error).__name__}: {error}"


def fail_job(folder: Path, error: BaseException) -> str:
    """Take note that a run failed, or was stopped, and return why."""
    reason, job = reason_of(error), read_json(folder / JOB)
    state: State = "failed"
    if isinstance(error, StoppedError):
        state = "requeued" if error.requeued else "interrupted"
    if job is not None:
        with suppress(OSError):  # as when the disk is full, which the reason says then
            write_json(folder / JOB, job | {"state": state, "error": reason})
    said = {"failed": "failed: ", "requeued": "was requeued: "}.get(state, "was ")
    return f"train.py {said}{reason}"


def read_job(folder: Path) -> Job:
    """Return the state of a run by what is in its folder.

    Raises:
        ValueError: its result, or what it noted, is cut or not one of ours.
    """
    job, overrides = read_json(folder / JOB), overrides_of(folder)
    if (folder / RESULT).exists():
        result = read_result(folder)
        if job is None or job.get("identity") == result.identity:
            return Job(folder, "finished", overrides, result)
    if (owner := owner_of(folder)) is not None:
        return Job(folder, "running", overrides, None, f"by {owner}")
    if job is None and not (folder / JOB).exists():
        return Job(folder, "unfinished", overrides)
    match job:
        case {"state": ("failed" | "interrupted" | "requeued" | "unfinished") as state, "error": str(error)}:
            return Job(folder, state, overrides, None, error)
    raise ValueError(f"{folder / JOB} is no note of a run, or was cut")


def read_jobs(folders: Iterable[Path]) -> tuple[list[Job], list[str]]:
    """Return all runs below some folders, and what is wrong with those that can't be read.

    Raises:
        FileNotFoundError: there is no such folder, or no run in it.
    """
    jobs, faults = [], []
    for folder in folders:
        found = sorted({path.parent for name in (RESULT, JOB) for path in folder.rglob(name)})
        if not found:
            raise FileNotFoundError(f"no {RESULT} below {str(folder)!r}: name the folder of a run or of a sweep")
        for place in found:
            try:
                jobs.append(replace(read_job(place), sweep=folder.name))
            except ValueError as error:
                faults.append(str(error))
    return jobs, faults


def labels(jobs: Sequence[Job]) -> list[str]:
    """Return for each run the overrides that it does not share with all others, and its sweep if there are several."""
    shared = set.intersection(*(set(job.overrides) for job in jobs)) if jobs else set()
    names = [", ".join(o for o in job.overrides if o not in shared) or job.folder.name for job in jobs]
    several = len({job.sweep for job in jobs}) > 1
    return [f"{job.sweep}: {name}" if several else name for job, name in zip(jobs, names, strict=True)]
