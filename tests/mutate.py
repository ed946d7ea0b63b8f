"""Change the source at random, one place at a time, and count the changes that the tests notice.

    python tests/mutate.py [PATH ...] [--count 300] [--seed 0] [--jobs 2] [--reach FILE]

Works in copies of the tree. A first run of the quick tests notes which functions each of them calls. A mutant is then
given to the tests that call the mutated function, those that mirror its file first and quick ones before slow ones, in
a process forked from one that has imported torch. Mutants that a person judged equivalent stand in
``equivalent_mutants.txt``, a line each as it is printed here, without the number; lines that begin with # say why.
"""

import argparse
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from _pytest.runner import runtestprotocol
from mutations import Mutant, mutants

ROOT = Path(__file__).parents[1]
ROOMS = ["ber", "tracing", "injection", "metrics", "evaluation", "callbacks"]
COPIED = ["bnnft", "conf", "examples", "tests", "train.py", "pyproject.toml", "setup.py", "README.md", "LICENSE"]
# they run commands in processes of their own, which no call is noted of, and take minutes
SLOW = ["tests/report", "tests/runs", "tests/train", "tests/callbacks/test_distributed.py", "tests/test_packaging.py"]
SLOW += [f"tests/test_{name}.py" for name in ("examples", "conf", "imports", "structure", "mutate")]
EQUIVALENT = ROOT / "tests" / "equivalent_mutants.txt"


@dataclass(frozen=True)
class Reach:
    """How long a test takes and which functions it calls, as (file, first line)."""

    seconds: float
    calls: frozenset[tuple[str, int]]


class Recorder:
    """A pytest plugin that notes what each test reaches."""

    def __init__(self, folder):
        self.folder, self.reached, self.failed = f"{folder}/", {}, []

    def pytest_runtest_protocol(self, item, nextitem):
        calls, start = set(), time.monotonic()

        def note(frame, event, argument):
            if event == "call" and frame.f_code.co_filename.startswith(self.folder):
                calls.add((frame.f_code.co_filename.removeprefix(self.folder), frame.f_code.co_firstlineno))

        threading.setprofile(note)
        sys.setprofile(note)
        try:
            reports = runtestprotocol(item, nextitem=nextitem)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
        if failed := any(report.failed for report in reports):
            self.failed.append(item.nodeid)
        self.reached[item.nodeid] = Reach(time.monotonic() - start, frozenset() if failed else frozenset(calls))
        return True


class Chosen:
    """A pytest plugin that runs the chosen tests, in their order, and those that only the mutant has brought up."""

    def __init__(self, tests, known):
        self.places, self.known = {test: place for place, test in enumerate(tests)}, known

    def pytest_collection_modifyitems(self, items):
        chosen = [item for item in items if item.nodeid in self.places or item.nodeid not in self.known]
        items[:] = sorted(chosen, key=lambda item: self.places.get(item.nodeid, -1))


def copy_tree(folder):
    folder.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "build"))
        else:
            shutil.copy(ROOT / name, folder / name)


def fork(folder, arguments, plugins, log):
    """Run pytest in a forked process, in a copy of the tree; returns its id."""
    process = os.fork()
    if process:
        return process
    os.setsid()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 3
    try:
        import pytest

        code = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments], plugins)
        for plugin in plugins:
            if isinstance(plugin, Recorder):
                (folder / "reach.pkl").write_bytes(pickle.dumps((plugin.reached, plugin.failed)))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(int(code))


def wait(process, limit):
    """Return the exit status of a process, or kill it and what it started after so many seconds and return None."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def record(folder):
    """Run the quick tests once and return what each of them reaches."""
    ignored = [f"--ignore={path}" for path in SLOW]
    status = wait(fork(folder, ignored, [Recorder(folder)], folder / "log.txt"), 3600)
    if status not in (0, 1):
        sys.exit(f"the tests do not run without a mutant:\n{(folder / 'log.txt').read_text()[-3000:]}")
    reached, failed = pickle.loads((folder / "reach.pkl").read_bytes())
    for test in failed:
        print(f"fails without a mutant, so it is left out: {test}", flush=True)
    return reached


def stages(mutant, reached):
    """Return the tests that reach a mutant, quick ones first: those that mirror its file, and all others."""
    first, last = mutant.lines
    tests = [
        test
        for test, reach in reached.items()
        if any(file == mutant.path and first <= line <= last for file, line in reach.calls)
    ]
    tests.sort(key=lambda test: reached[test].seconds)
    path = Path(mutant.path)
    mirror = "/".join(["tests", *path.parts[1:-1], f"test_{path.name}"])
    near = [test for test in tests if test.split("::")[0] in (mirror, mutant.path)]
    return near, [test for test in tests if test not in set(near)]


def survives(mutant: Mutant, folder, reached) -> bool:
    """Return whether all tests that reach a mutant pass."""
    file = folder / mutant.path
    original = file.read_bytes()
    file.write_bytes(mutant.applied(original))
    try:
        for tests in filter(None, stages(mutant, reached)):
            files = list(dict.fromkeys(test.split("::")[0] for test in tests))
            limit = 30 + 5 * sum(reached[test].seconds for test in tests)
            if wait(fork(folder, ["-x", *files], [Chosen(tests, reached)], folder / "log.txt"), limit) != 0:
                return False
        return True
    finally:
        file.write_bytes(original)


def judge(chosen, folder, reached):
    """Fork a process that judges some mutants in a copy of the tree, prints survivors and keeps them in a file."""
    process = os.fork()
    if process:
        return process
    survivors = []
    for number, mutant in enumerate(chosen, 1):
        if survives(mutant, folder, reached):
            survivors.append(mutant)
            print(f"{number} of {len(chosen)}, line {mutant.line}: {mutant}", flush=True)
    (folder / "survivors.pkl").write_bytes(pickle.dumps(survivors))
    os._exit(0)


def preload():
    """Import what is slow to import, once for all mutants; pytest has to import its plugins by itself."""
    import lightning
    import matplotlib.pyplot
    import pytest
    import scipy.stats
    import sklearn.datasets
    import torch._dynamo
    import torchmetrics
    import torchvision

    return lightning, matplotlib, pytest, scipy, sklearn, torch, torchmetrics, torchvision


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="*", default=[f"bnnft/{room}" for room in ROOMS])
    parser.add_argument("--count", type=int, default=300, help="of mutants; all if there are fewer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--reach", type=Path, help="file that keeps what the tests reach from one run to the next")
    given = parser.parse_args()
    known = {line for line in EQUIVALENT.read_text().splitlines() if line and not line.startswith("#")}
    every = [mutant for path in given.paths for mutant in mutants(ROOT, path) if str(mutant) not in known]
    chosen = random.Random(given.seed).sample(every, min(given.count, len(every)))
    sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "tests")]
    preload()
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, str(job)) for job in range(given.jobs)]
        for folder in folders:
            copy_tree(folder)
        if given.reach is not None and given.reach.exists():
            reached = pickle.loads(given.reach.read_bytes())
        else:
            reached = record(folders[0])
            if given.reach is not None:
                given.reach.write_bytes(pickle.dumps(reached))
        workers = [judge(chosen[job :: given.jobs], folder, reached) for job, folder in enumerate(folders)]
        for worker in workers:
            os.waitpid(worker, 0)
        survivors = [mutant for folder in folders for mutant in pickle.loads((folder / "survivors.pkl").read_bytes())]
    caught = len(chosen) - len(survivors)
    share = caught / len(chosen)
    print(f"{caught} of {len(chosen)} mutants caught ({share:.1%}), of {len(every)} possible ones, seed {given.seed}")
    return int(share < 0.95)


if __name__ == "__main__":
    sys.exit(main())
