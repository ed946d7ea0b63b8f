"""What a run leaves in its folder once it is done: ``metrics.json``."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from bnnft.evaluation.curve import BERCurve
from bnnft.runs.claim import is_first_process
from bnnft.runs.identity import identity

RESULT = "metrics.json"
_HOW = ("score", "higher_is_better", "bounds", "name")  # what a file may lack that an older version wrote


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
        identity: of the config, see :func:`bnnft.runs.identity.identity`.
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
    write_json(folder / RESULT, content | {"seconds": seconds, "identity": own})
    return Result(folder, values, by_key(several), overrides_of(folder), config, seconds, own)


def _plain(curve: BERCurve) -> dict[str, Any]:
    """Return a curve in types that JSON has."""
    values = "accuracy" if curve.score == "accuracy" else "values"
    content = {"axis": curve.axis, "rates": curve.rates, values: curve.values.tolist(), "clean": curve.clean}
    return content | {name: getattr(curve, name) for name in _HOW}


def _curve(content: Mapping[str, Any]) -> BERCurve:
    """Return the curve of :func:`_plain`, also as older versions wrote it."""
    rest: dict[str, Any] = {name: content[name] for name in _HOW if name in content}
    if rest.get("bounds") is not None:
        low, high = rest["bounds"]
        rest["bounds"] = (_number(low), _number(high))
    for text in ("score", "name"):
        _expect(isinstance(rest.get(text, ""), str), f"a curve whose {text} is a text")
    _expect(isinstance(content["axis"], str), "a curve whose axis is a text")
    _expect(rest.get("higher_is_better") in (True, False, None), "a curve that says whether higher is better")
    values = torch.tensor(content["accuracy" if "accuracy" in content else "values"], dtype=torch.float64)
    rates = tuple(map(_number, content["rates"]))
    _expect(all(map(math.isfinite, rates)), "finite rates")
    return BERCurve(rates, values, _number(content["clean"]), content["axis"], **rest)


def _number(value: Any) -> float:
    _expect(isinstance(value, int | float), f"a number, not {value!r:.50}")
    return float(value)


def _expect(true: bool, what: str) -> None:
    if not true:
        raise ValueError(f"it should hold {what}")


def read_result(folder: Path) -> Result:
    """Read what :func:`write_result` wrote, with the run's overrides where Hydra left them.

    Raises:
        ValueError: the file is cut or not one of ours.
    """
    try:
        content = json.loads((folder / RESULT).read_text())
        written = [content["curve"]] if content["curve"] is not None else []
        curves = by_key(_curve(curve) for curve in [*written, *content.get("further_curves", [])])
        metrics = {name: _number(value) for name, value in content["metrics"].items()}
        config, seconds, own = (content[name] for name in ("config", "seconds", "identity"))
        _expect(isinstance(config, dict) and isinstance(own, str), "a config, and a text as identity")
        _expect(0 <= _number(seconds) < math.inf, "how many seconds the run took")
        return Result(folder, metrics, curves, overrides_of(folder), config, seconds, own)
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / RESULT} is no result of a run, or was cut: {error}") from error


def overrides_of(folder: Path) -> tuple[str, ...]:
    """Return the settings of the command line of a run, where Hydra left them; nothing where that can't be read."""
    path = folder / ".hydra" / "overrides.yaml"
    try:
        # as they were typed: an override may hold an interpolation
        typed: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception:  # parsers of YAML have errors of several kinds
        return ()
    return tuple(typed) if isinstance(typed, list) and all(isinstance(each, str) for each in typed) else ()


def read_json(path: Path) -> dict[str, Any] | None:
    """Return what a file holds by name, nothing where there is none, where it was cut or holds something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, RecursionError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file whole or not at all, by the first process of a distributed run alone."""
    if not is_first_process():
        return
    scratch = path.with_name(f"{path.name}.part")
    scratch.write_text(json.dumps(content, indent=1))
    scratch.replace(path)
