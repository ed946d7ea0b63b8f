"""What a run leaves in its folder: ``job.json`` from its start on, and ``metrics.json`` once it is done."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import OmegaConf

from bnnft.evaluation.curve import BERCurve

RESULT, JOB = "metrics.json", "job.json"
_HOW = ("score", "higher_is_better", "bounds", "name")  # what a file may lack that an older version wrote
State = Literal["finished", "failed", "unfinished"]


@dataclass(frozen=True)
class Result:
    """What one run left.

    Attributes:
        folder: where it ran.
        metrics: last value of everything it logged.
        curves: what was measured over BER, see :func:`by_key`.
        overrides: the settings of its command line.
        config: its whole resolved config.
        seconds: how long it took.
        identity: of the config, see :func:`identity`.
    """

    folder: Path
    metrics: Mapping[str, float]
    curves: Mapping[str, BERCurve] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    identity: str = ""

    @property
    def curve(self) -> BERCurve | None:
        """The first curve, if there is one."""
        return next(iter(self.curves.values()), None)

    @property
    def clean(self) -> float:
        """Accuracy without flips, NaN if it was not measured."""
        measured = (curve.clean for curve in self.curves.values() if curve.score == "accuracy")
        return next(measured, self.metrics.get("test/acc", math.nan))

    def objective(self, names: str | Sequence[str]) -> float | tuple[float, ...]:
        """Return the metric of this name, or of several names: what a sweeper optimizes.

        Raises:
            ValueError: nothing was logged under such a name.
        """
        for name in [names] if isinstance(names, str) else names:
            if name not in self.metrics:
                raise ValueError(f"optimized_metric must be among {', '.join(self.metrics)}, got {name!r}")
        return self.metrics[names] if isinstance(names, str) else tuple(self.metrics[name] for name in names)


@dataclass(frozen=True)
class Job:
    """One run of a sweep, in whatever state it is.

    Attributes:
        folder: where it runs or ran.
        state: ``"unfinished"`` if it still runs, or was cut without a word.
        overrides: the settings of its command line.
        result: what it left, if it is finished.
        error: why it failed.
        sweep: name of the folder that was asked for.
    """

    folder: Path
    state: State
    overrides: tuple[str, ...] = ()
    result: Result | None = None
    error: str = ""
    sweep: str = ""


def by_key(curves: Iterable[BERCurve]) -> dict[str, BERCurve]:
    """Return the curves of one run by what tells them apart: their names, nothing for one that has none.

    Further curves without a name are called as in the log.
    """
    found: dict[str, BERCurve] = {}
    for curve in curves:
        found[curve.names.over if curve.name in found else curve.name] = curve
    return found


def write_result(
    folder: Path,
    metrics: Mapping[str, Any],
    curves: BERCurve | Sequence[BERCurve] | None,
    config: Mapping[str, Any],
    seconds: float = 0.0,
) -> Result:
    """Write ``metrics.json`` into the folder of a run, whole or not at all."""
    own = identity(config, folder)
    values = {name: float(value) for name, value in metrics.items()}
    several = [curves] if isinstance(curves, BERCurve) else list(curves or ())
    first, *further = map(_plain, several) if several else [None]
    content = {"metrics": values, "curve": first, "further_curves": further, "config": config}
    _write(folder / RESULT, content | {"seconds": seconds, "identity": own})
    return Result(folder, values, by_key(several), _overrides(folder), config, seconds, own)


def _plain(curve: BERCurve) -> dict[str, Any]:
    """Return a curve in types that JSON has."""
    values = "accuracy" if curve.score == "accuracy" else "values"
    content = {"axis": curve.axis, "rates": curve.rates, values: curve.values.tolist(), "clean": curve.clean}
    return content | {name: getattr(curve, name) for name in _HOW}


def _curve(content: Mapping[str, Any]) -> BERCurve:
    """Return the curve of :func:`_plain`, also as older versions wrote it."""
    rest: dict[str, Any] = {name: content[name] for name in _HOW if name in content}
    if "bounds" in rest:
        rest["bounds"] = tuple(rest["bounds"])
    values = torch.tensor(content["accuracy" if "accuracy" in content else "values"], dtype=torch.float64)
    return BERCurve(tuple(content["rates"]), values, content["clean"], content["axis"], **rest)


def read_result(folder: Path) -> Result:
    """Read what :func:`write_result` wrote, with the run's overrides where Hydra left them.

    Raises:
        ValueError: the file is cut or not one of ours.
    """
    try:
        content = json.loads((folder / RESULT).read_text())
        written = [content["curve"]] if content["curve"] is not None else []
        curves = by_key(_curve(curve) for curve in [*written, *content.get("further_curves", [])])
        rest = (content[name] for name in ("config", "seconds", "identity"))
        return Result(folder, content["metrics"], curves, _overrides(folder), *rest)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / RESULT} is no result of a run, or was cut: {error}") from error


def begin_job(folder: Path, config: Mapping[str, Any]) -> Result | None:
    """Return the result of an earlier run with the same config, or take note that one starts.

    A checkpoint to go on from is kept for a config that is the same, and removed for another one.
    """
    own = identity(config, folder)
    if (_read(folder / RESULT) or {}).get("identity") == own:
        return read_result(folder)
    if (_read(folder / JOB) or {}).get("identity") != own:
        last_checkpoint(folder).unlink(missing_ok=True)
    _write(folder / JOB, {"identity": own, "state": "unfinished", "error": ""})
    return None


def last_checkpoint(folder: Path) -> Path:
    """Return where a run keeps the checkpoint to go on from."""
    return folder / "checkpoints" / "last.ckpt"


def fail_job(folder: Path, error: BaseException) -> str:
    """Take note that a run failed, and return why: the cause, where Hydra could not build a part of the config."""
    while type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        error = error.__cause__
    reason = f"{type(error).__name__}: {error}"
    job = _read(folder / JOB)
    if job is not None:
        _write(folder / JOB, job | {"state": "failed", "error": reason})
    return reason


def read_job(folder: Path) -> Job:
    """Return the state of a run by what is in its folder.

    Raises:
        ValueError: its result is cut.
    """
    job, overrides = _read(folder / JOB), _overrides(folder)
    if (folder / RESULT).exists():
        result = read_result(folder)
        if job is None or job["identity"] == result.identity:
            return Job(folder, "finished", overrides, result)
    if job is None:
        return Job(folder, "unfinished", overrides)
    return Job(folder, job["state"], overrides, None, job["error"])


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


def _overrides(folder: Path) -> tuple[str, ...]:
    path = folder / ".hydra" / "overrides.yaml"
    # as they were typed: an override may hold an interpolation
    typed: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False) if path.exists() else []
    return tuple(map(str, typed))


def identity(config: Mapping[str, Any], folder: Path) -> str:
    """Return a hash that is the same for the same settings, wherever and by however many threads they are run."""
    settings = {name: value for name, value in config.items() if name not in ("data_dir", "threads")}
    text = json.dumps(settings, sort_keys=True)
    for place in (str(folder.absolute()), config.get("data_dir")):
        text = text.replace(json.dumps(place)[1:-1], "") if place else text
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_name(f"{path.name}.part")
    scratch.write_text(json.dumps(content, indent=1))
    scratch.replace(path)
