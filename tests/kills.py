"""Kill a job at random times, resume it each time, and compare: ``python tests/kills.py [KILLS] [SEED]``."""

import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from threading import Event

import torch
from commands import Started, prepared

JOB = ["-m", "name=killed", "seed=3", "threads=1", "logger=none", "trainer.max_epochs=4", "model.widths=[32]"]
CURVE = ["callbacks.accuracy_over_ber.maps=2", "callbacks.accuracy_over_ber.rates=[0,0.1,0.3]"]


def start(folder):
    folder.mkdir(exist_ok=True)
    return Started("train.py", *JOB, *CURVE, cwd=folder, env=prepared(folder))


def outcome(folder):
    """Return the numbers and the weights that a finished job left."""
    (job,) = (folder / "multirun" / "killed").glob("*/")
    content = json.loads((job / "metrics.json").read_text())
    weights = torch.load(job / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    return content["metrics"], content["curve"], {name: value.tolist() for name, value in weights.items()}


def uncut(folder):
    """Run the job; return its outcome and its seconds."""
    begun = time.perf_counter()
    done = start(folder).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    return outcome(folder), time.perf_counter() - begun


def killed_and_resumed(folder, seconds):
    """Kill the job after so many seconds, run it again; return whether it was killed, how far it was, its outcome."""
    process = start(folder)
    Event().wait(seconds)
    process.kill()  # one that has ended by itself is there until it is waited for
    killed = process.wait().returncode == -signal.SIGKILL
    written = {path.name for path in folder.rglob("*") if path.is_file()}
    stages = {"metrics.json": "done", "last.ckpt": "trained an epoch", "job.json": "began"}
    stage = next((said for name, said in stages.items() if name in written), "not begun")
    done = start(folder).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    return killed, stage, outcome(folder)


def main(kills=100, seed=0):
    """Draw moments until there were so many kills; one after the end of the job is none."""
    generator, stages, unequal, drawn = random.Random(int(seed)), Counter(), [], 0
    with tempfile.TemporaryDirectory() as place:
        start(Path(place, "first")).wait()  # starts the server, too
        whole, duration = uncut(Path(place, "uncut"))
        while stages.total() < int(kills):
            moment, drawn = generator.uniform(0, duration), drawn + 1
            killed, stage, ours = killed_and_resumed(Path(place, str(drawn)), moment)
            stages[stage] += killed
            if ours != whole:
                unequal.append((moment, stage))
    print(
        f"{kills} kills, seed {seed}, {drawn} moments within {duration:.2f} s: {len(unequal)} results differ {unequal}"
    )
    for stage, count in sorted(stages.items()):
        print(f"  {count:3} {stage}")
    return bool(unequal)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
