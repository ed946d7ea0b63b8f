"""Say how far a sweep is, and at its end what became of every job."""

import atexit
import hashlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from bnnft.runs.job import Job, read_jobs
from bnnft.runs.results import RESULT, read_result
from bnnft.runs.tables import duration, job_table


def folder_name(name: Any) -> str:
    """Return a name of one folder that file systems take, so that nothing that users type leads elsewhere.

    Slashes and points at the start are replaced. What was replaced, or is too long, ends in a hash of the whole, so
    that no two texts have one name.

    Example:
        >>> folder_name("ber.rate=0.1,seed=0"), len(folder_name("+note=" + 300 * "a"))
        ('ber.rate=0.1,seed=0', 200)
        >>> folder_name("../x"), folder_name("")
        ('__x-d6b96a97d147', 'defaults')
    """
    text = str(name)
    plain = re.sub(r"^\.+|[/\\\0]", "_", text)
    if plain == text and len(text.encode()) <= 200:
        return text or "defaults"
    start = plain.encode()[:187].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


# for conf/train.yaml; this module is imported before any folder is named, as a callback of Hydra's
OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


class SweepProgress(Callback):
    """Hydra callback: before each job of a sweep which of how many it is, at the end a table of all of them.

    The table comes when the process ends, so that it comes after a failure or an interrupt too.
    """

    def __init__(self) -> None:
        self._total: int | None = None
        self._seconds: list[float] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Count the jobs."""
        self._total = sweep_size(config)
        search = OmegaConf.select(config, "hydra.sweeper.n_trials") is not None
        atexit.register(_print_jobs, Path(config.hydra.sweep.dir), [] if search else sweep_overrides(config))

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Say which job starts, and when the last one may be done."""
        if config.hydra.mode is None or config.hydra.mode.name != "MULTIRUN":
            return
        number = config.hydra.job.num
        of, left = "", ""
        if self._total is not None:  # with other launchers jobs run in other processes, which don't know
            of = f" of {self._total}"
            if self._seconds:
                seconds = sum(self._seconds) / len(self._seconds) * (self._total - number)
                left = f", {duration(seconds)} left for all"
        print(f"job {number + 1}{of}: {config.hydra.job.override_dirname}{left}", flush=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Take in how long the job took, now or when it was done before."""
        folder = Path(config.hydra.runtime.output_dir)
        if (folder / RESULT).exists():
            self._seconds.append(read_result(folder).seconds)


def sweep_size(config: DictConfig) -> int | None:
    """Return the number of jobs of a sweep, ``None`` if the sweeper does not say it beforehand."""
    trials: int | None = OmegaConf.select(config, "hydra.sweeper.n_trials")
    return len(sweep_overrides(config)) if trials is None else trials


def sweep_overrides(config: DictConfig) -> list[tuple[str, ...]]:
    """Return the overrides of each job of a sweep over all combinations, in the order that they start in."""
    # as they were typed: an override may hold an interpolation of the job's config
    typed: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    sweeper: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=False)
    typed = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()] + typed
    values: dict[str, list[str]] = {}
    for each in OverridesParser.create().parse_overrides(typed):
        swept = each.is_sweep_override()
        texts = each.sweep_string_iterator() if swept else [each.get_value_element_as_str()]
        values[each.get_key_element()] = [f"{each.get_key_element()}={text}" for text in texts]
    return list(itertools.product(*values.values()))


def all_jobs(found: Sequence[Job], overrides: Sequence[tuple[str, ...]], sweep: str) -> list[Job]:
    """Return the jobs of a sweep in the order of their overrides, also those that did not start, then further ones."""
    kept = {job.overrides: job for job in found}
    first = {each: kept.get(each, Job(Path(",".join(each)), "not run", each, sweep=sweep)) for each in overrides}
    return list((first | kept).values())


def _print_jobs(folder: Path, overrides: Sequence[tuple[str, ...]]) -> None:
    try:
        jobs, faults = read_jobs([folder])
    except FileNotFoundError:
        return  # nothing was begun
    rich.print(job_table(all_jobs(jobs, overrides, folder.name)))
    for fault in faults:
        print(fault)
