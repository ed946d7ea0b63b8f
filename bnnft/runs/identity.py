"""Whether two runs have the same settings, wherever they are run."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.utils import get_object


def identity(config: Mapping[str, Any], folder: Path) -> str:
    """Return a hash that is the same for the same settings, wherever the folder of the run lies.

    Every setting is in it that can change a number; the number of threads can, since sums round in another order.
    For the folder of the data its content stands, where the data set can tell it by a function ``content``.

    Args:
        config: all settings of a run, resolved.
        folder: of the run.
    """
    places = {str(folder.absolute()): "<folder>"}
    settings = {name: value for name, value in config.items() if name not in ("data_dir", "verbose")}
    if isinstance(data_dir := config.get("data_dir"), str):
        places[data_dir] = f"<data {_content(config.get('dataset'), data_dir)}>"
    return hashlib.sha256(json.dumps(_without(settings, places), sort_keys=True).encode()).hexdigest()


def portable(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return settings with ``<folder>`` in place of the folder of their run, so that they differ by no path.

    Example:
        >>> portable({"seed": 0, "output_dir": "/runs/7", "files": ["/runs/7/log"]}, Path("/runs/7"))
        {'seed': 0, 'output_dir': '<folder>', 'files': ['<folder>/log']}
    """
    settings: dict[str, Any] = _without(config, {str(folder.absolute()): "<folder>"})
    return settings


def _content(dataset: Any, data_dir: str) -> str:
    if isinstance(dataset, Mapping) and isinstance(target := dataset.get("_target_"), str):
        with suppress(Exception):  # a target that is not there gets its error where it is built
            return str(get_object(target).content(data_dir))
    return str(Path(data_dir).absolute())


def _without(value: Any, places: Mapping[str, str]) -> Any:
    """Replace folders, and the start of what lies in them, in all texts of some settings."""
    if isinstance(value, Mapping):
        return {key: _without(each, places) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without(each, places) for each in value]
    if isinstance(value, str):
        for place, name in places.items():
            if value == place or value.startswith(f"{place}/"):
                return name + value[len(place) :]
    return value
