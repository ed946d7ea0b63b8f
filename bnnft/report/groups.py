"""Runs of one or more sweeps put into groups, and the curve of each group."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from bnnft.evaluation.curve import interval
from bnnft.runs.curves import CurveKind
from bnnft.runs.job import Job
from bnnft.runs.results import Result

MOST_GROUPS = 12  # lines in a figure that can still be told apart


def settings_of(jobs: Sequence[Job]) -> list[dict[str, str]]:
    """Return for each run the settings by which runs were told apart on the command line, with the defaults of others.

    With several sweeps their folder's name is the setting ``sweep``.
    """
    said = [dict(override.lstrip("+~").split("=", 1) for override in job.overrides if "=" in override) for job in jobs]
    configs = [flat(job.result.config) if job.result else {} for job in jobs]
    names = dict.fromkeys(name for overrides in said for name in overrides)
    settings = [
        {name: overrides.get(name, config.get(name, "")) for name in names}
        for overrides, config in zip(said, configs, strict=True)
    ]
    if len({job.sweep for job in jobs}) > 1:
        settings = [{"sweep": job.sweep} | own for job, own in zip(jobs, settings, strict=True)]
    return settings


def varied(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the names of settings that differ between runs."""
    return [name for name in (settings[0] if settings else {}) if len({own[name] for own in settings}) > 1]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return a config as dotted names and values, as on the command line.

    Example:
        >>> flat({"ber": {"rate": 0.1}, "seed": 0})
        {'ber.rate': '0.1', 'seed': '0'}
    """
    values: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value)
    return values


def grouping(jobs: Sequence[Job], key: str | None) -> tuple[str, list[str]]:
    """Return the setting to group by, and its value for each run; without one, the first that makes few groups.

    Raises:
        ValueError: there is no such setting.
    """
    settings = settings_of(jobs)
    names = varied(settings)
    if key is None:
        few = [name for name in names if len({own[name] for own in settings}) <= MOST_GROUPS]
        key = few[0] if few else names[0] if names else ""
    if not key:
        return "run", ["" for _ in jobs]
    if settings and key in settings[0]:
        return key, [own[key] for own in settings]
    configs = [flat(job.result.config) if job.result else {} for job in jobs]
    if not any(key in config for config in configs):
        others = sorted({name for config in configs for name in config} - set(names))
        raise ValueError(
            f"--group-by must be a setting of these runs, got {key!r}; there are {', '.join(names + others)}"
        )
    return key, [config.get(key, "") for config in configs]


def sort_key(value: str) -> tuple[int, float, str]:
    """Return what sorts numbers by size, before all other texts."""
    try:
        return 0, float(value), value
    except ValueError:
        return 1, 0.0, value


def in_groups(jobs: Sequence[Job], values: Sequence[str]) -> Iterator[tuple[str, list[Result]]]:
    """Yield each value with the results of its runs, in the order of the values."""
    for value in sorted(set(values), key=sort_key):
        results = [job.result for job, own in zip(jobs, values, strict=True) if own == value and job.result]
        if results:
            yield value, results


def pooled(
    results: Sequence[Result], kind: CurveKind | None = None
) -> tuple[list[float], list[float], list[tuple[float, float]]]:
    """Return rates, mean scores and 95 % intervals of several runs.

    Where several runs have a rate, each counts with its mean over fault maps: the spread over runs is what says whether
    a difference between groups is one. A single run has the spread over its fault maps.

    Args:
        results: of the runs.
        kind: of their curves; accuracy over BER if ``None``.
    """
    found = map((kind or CurveKind()).of, results)
    curves = [curve for curve in found if curve is not None]
    rates = sorted({rate for curve in curves for rate in curve.rates})
    means, intervals = [], []
    for rate in rates:
        maps = [curve.values[curve.rates.index(rate)] for curve in curves if rate in curve.rates]
        values = torch.stack([scores.mean() for scores in maps]) if len(maps) > 1 else maps[0]
        means.append(float(values.mean()))
        intervals.append(interval(values, curves[0].bounds) if len(values) > 1 else (means[-1], means[-1]))
    return rates, means, intervals
