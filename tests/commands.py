"""Run the commands that users type, each in a process and a folder of its own."""

import atexit
import functools
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUICK = ["verbose=true", "trainer.max_epochs=2", "model.widths=[64,32]", "callbacks.accuracy_over_ber.maps=2"]


class Server:
    """A server of processes, which has imported the libraries once for all commands of the tests."""

    def __init__(self):
        program = [sys.executable, ROOT / "tests" / "process_server.py"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(program, stdin=pipe, stdout=pipe, text=True, env=environment)
        atexit.register(self.process.communicate)  # it ends when there can be no more requests

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request, default=str) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


server = functools.cache(Server)


class Started:
    """A process that runs ``python SCRIPT ARGUMENTS``."""

    def __init__(self, script, *arguments, cwd=None, env=os.environ):
        self.args = [str(part) for part in (script, *arguments)]
        self.folder = tempfile.TemporaryDirectory(prefix="bnnft_")
        self.files = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        for file in self.files:
            file.touch()  # a process may be killed before it gets there
        where = {"folder": cwd or os.getcwd(), "environment": {"OMP_NUM_THREADS": "1"} | dict(env), "files": self.files}
        self.pid = server().ask(script=self.args[0], arguments=self.args[1:], **where)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def wait(self):
        """Return the finished process as `subprocess.run` does."""
        return finished([self])[0]


def finished(processes):
    """Wait for processes that work together; if one fails, the others are killed."""
    codes = server().ask(wait=[process.pid for process in processes])
    done = []
    for process, code in zip(processes, codes, strict=True):
        with process.folder:
            said = [file.read_text() for file in process.files]
        done.append(subprocess.CompletedProcess(process.args, code, *said))
    return done


def completed(*command, anew=False, **where):
    """Run ``python SCRIPT ARGUMENTS`` in a process of the server, or anew, in one that shares nothing with others."""
    if anew:
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, **where)
    return Started(*command, **where).wait()


def prepared(folder):
    """Give a folder train.py and conf, and return the environment: W&B stays offline and writes nothing elsewhere."""
    for name in ("train.py", "conf"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    quiet = {"WANDB_MODE": "offline", "WANDB_DATA_DIR": str(folder / "staged"), "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | quiet | {"PYTHONPATH": paths, "COLUMNS": "120"}


def finds_tests(**environment):
    """Return the environment in which scripts of the tests run."""
    paths = [ROOT, ROOT / "tests", ROOT / "tests" / "foreign", os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))} | environment


def run_script(name, *arguments, anew=False):
    """Run a script of the tests in a process of its own."""
    return completed(ROOT / "tests" / name, *arguments, anew=anew, env=finds_tests())


def run_ranks(name, *arguments, ranks=2):
    """Run a script of the tests in processes that work together, started as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    places = [{"LOCAL_RANK": str(rank), "RANK": str(rank)} | meeting for rank in range(ranks)]
    return finished([Started(ROOT / "tests" / name, *arguments, env=finds_tests(**place)) for place in places])


def call_on_two_processes(function, *arguments):
    """Call a function of a test file with the rank, and then what can be written as JSON, on two processes."""
    done = run_ranks("call.py", inspect.getfile(function), function.__name__, json.dumps(arguments, default=str))
    assert all(process.returncode == 0 for process in done), "".join(process.stderr[-3000:] for process in done)


def run(folder, *arguments, anew=False, **environment):
    """Run train.py."""
    return completed("train.py", *arguments, anew=anew, cwd=folder, env=prepared(folder) | environment)
