"""Read a finished offline W&B run back without a server, from the file that `wandb sync` would send."""

import json
import struct
from pathlib import Path

from wandb.proto import wandb_internal_pb2


def _records(path):
    """The file is a LevelDB log: blocks of 32 KiB, each record in one or more parts, after a header of 7 bytes."""
    data, place, record = Path(path).read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def _items(message):
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in message}


def read(directory):
    """Config, summary, history, group, tags, x axes, artifacts and exit code of the run in a folder."""
    run = {"dir": Path(directory), "config": {}, "summary": {}, "history": [], "metrics": {}, "exit": None}
    run["artifacts"] = []
    for record in _records(next(Path(directory).glob("*.wandb"))):
        match record.WhichOneof("record_type"):
            case "run":
                run["config"] |= _items(record.run.config.update)
                run |= {"group": record.run.run_group, "tags": list(record.run.tags), "name": record.run.display_name}
                run["job_type"] = record.run.job_type
            case "config":
                run["config"] |= _items(record.config.update)
            case "summary":
                run["summary"] |= _items(record.summary.update)
            case "history":
                run["history"].append(_items(record.history.item))
            case "metric":
                run["metrics"][record.metric.name] = record.metric.step_metric
            case "artifact":
                names = [entry.path for entry in record.artifact.manifest.contents]
                run["artifacts"].append({"type": record.artifact.type, "files": names})
            case "exit":
                run["exit"] = record.exit.exit_code
    return run


def column(run, key):
    """All logged values of a key, in order."""
    return [row[key] for row in run["history"] if key in row]


def table(run, key):
    """A logged table, as its columns and data."""
    return json.loads((run["dir"] / "files" / run["summary"][f"{key}.path"]).read_text())
