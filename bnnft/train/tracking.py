"""The W&B run of a job: one however often the job is cut, with what was set, what came out, and why it failed."""

import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

from bnnft.runs.identity import portable
from bnnft.runs.results import overrides_of

_VARIABLES = {  # of W&B, and the argument of its logger that each stands for
    "WANDB_PROJECT": "project",
    "WANDB_ENTITY": "entity",
    "WANDB_RUN_GROUP": "group",
    "WANDB_JOB_TYPE": "job_type",
    "WANDB_NAME": "name",
    "WANDB_TAGS": "tags",
    "WANDB_RUN_ID": "id",
    "WANDB_MODE": "mode",
}
_RESULTS = ("*.csv", "metrics.json", "*.log")  # of an artifact, beside the configuration
_APART = 10**6  # steps between the parts of a run that was cut: more than a part can have


def built_loggers(entries: Mapping[str, Any] | None, name: str, run: str) -> list[Any]:
    """Build the loggers of a config; W&B's goes on with the run of the job, and leaves to ``WANDB_*`` what these set.

    Args:
        entries: of the group ``logger``.
        name: of a run that has no name.
        run: the id of the job's run.
    """
    return [instantiate(entry, **_of_the_job(entry, name, run)) for entry in (entries or {}).values() if entry]


def _of_the_job(entry: Any, name: str, run: str) -> dict[str, str | None]:
    """Return the arguments of a logger that its job and the environment decide."""
    if not str(entry.get("_target_", "")).endswith(".WandbLogger"):
        return {}
    left = {argument: None for variable, argument in _VARIABLES.items() if os.environ.get(variable)}
    return {"id": entry.get("id") or run, "name": entry.get("name") or name} | left


def describe(loggers: Sequence[Any], settings: Mapping[str, Any], folder: Path, starts: int = 1) -> None:
    """Log the settings of a job, and its overrides.

    Args:
        loggers: of the job.
        settings: all of them, resolved.
        folder: of the job, which no setting is to differ by.
        starts: how often the job was started, this time included.
    """
    known = portable(settings, folder)
    own = {**known, "overrides": list(overrides_of(folder))}
    if os.environ.get("WANDB_SWEEP_ID"):  # W&B locks what it sweeps: of a group that it chooses, the name alone
        own["settings"] = known
    for logger in loggers:
        logger.log_hyperparams(own)
    for run in _runs(loggers):
        if starts > 1 and not getattr(run, "resumed", False):  # offline: rows of a step that was there are dropped
            run.log({"starts": starts}, step=(starts - 1) * _APART)


def define_summaries(loggers: Sequence[Any], directions: Mapping[str, str]) -> None:
    """Let W&B keep the best and the last value of metrics, given ``"max"`` or ``"min"`` for each."""
    for run in _runs(loggers):
        for metric, direction in directions.items():
            run.define_metric(metric, step_metric="trainer/global_step", summary=f"{direction},last")


def summarize(loggers: Sequence[Any], values: Mapping[str, Any]) -> None:
    """Put values into the summary of the W&B run."""
    for run in _runs(loggers):
        run.summary.update(dict(values))


def keep_results(loggers: Sequence[Any], folder: Path, settings: Mapping[str, Any]) -> None:
    """Log what came out of a job as an artifact of its W&B run: configuration, curves, table, numbers and log."""
    for run in _runs(loggers):
        with tempfile.TemporaryDirectory() as copies:
            for path in (path for pattern in _RESULTS for path in folder.glob(pattern)):
                shutil.copy(path, copies)
            Path(copies, "config.yaml").write_text(OmegaConf.to_yaml(portable(settings, folder)), encoding="utf-8")
            run.log_artifact(copies, name=f"results-{run.id}", type="results")


@contextmanager
def finished(loggers: Sequence[Any], reason: Callable[[BaseException], str] = repr) -> Iterator[None]:
    """End each W&B run after the context: otherwise the jobs of a sweep would write into one.

    An error makes it a failed run, with the code of the process, the reason in its summary as ``error``, and the
    traceback among its files.
    """
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        for run in _runs(loggers):
            run.summary.update({"error": reason(error)})
            place = Path(run.dir, "traceback.txt")
            place.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            run.save(str(place), base_path=run.dir, policy="now")
            run.finish(exit_code=code)
        raise
    for run in _runs(loggers):
        run.finish(exit_code=0)


def wandb_folder(loggers: Sequence[Any]) -> Path | None:
    """Return where the W&B run among these loggers is on disk, if there is one."""
    return next((Path(run.dir).parent for run in _runs(loggers)), None)


def _runs(loggers: Sequence[Any]) -> list[Any]:
    """Return the W&B runs of some loggers; other processes than the first have none."""
    runs = [getattr(logger, "experiment", None) for logger in loggers]
    return [run for run in runs if hasattr(run, "define_metric") and isinstance(getattr(run, "dir", None), str)]
