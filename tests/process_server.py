"""Start processes that have imported the libraries already: what ``python SCRIPT ARGUMENTS`` does, seconds earlier.

`commands.py` starts one server for each process of pytest and writes a request on each line: of a process to start,
which is answered with its id, or of processes to wait for, which is answered with their exit codes.

Nothing of bnnft is imported here, so that each process imports the code under test itself. No thread runs when it is
forked. What the processes of one server share is the seed of Python's hashes: what could depend on the order of a set
needs another process to compare with.
"""

import atexit
import gc
import importlib
import json
import os
import random
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import numpy
import torch

LIBRARIES = [
    *("torch", "torch._dynamo", "torch.distributed", "torch.distributed.fsdp", "torch.utils.serialization.config"),
    *(
        "lightning.pytorch",
        "lightning.pytorch.cli",
        "lightning.pytorch.loggers",
        "torchmetrics",
        "fsspec",
        "tensorboard",
    ),
    *("wandb", "wandb.sdk.launch", "hydra", "hydra._internal.hydra", "hydra._internal.utils", "omegaconf"),
    *("hydra._internal.core_plugins.basic_sweeper", "hydra._internal.core_plugins.basic_launcher"),
    *("hydra.experimental.callbacks", "hydra_plugins.hydra_joblib_launcher.joblib_launcher"),
    *("hydra_plugins.hydra_submitit_launcher.submitit_launcher", "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper"),
    *("joblib", "optuna", "submitit", "jsonargparse", "matplotlib.pyplot", "matplotlib.backends.backend_agg"),
    *("matplotlib.backends.backend_svg", "sklearn.datasets", "scipy.stats", "rich.progress", "rich.table"),
]


def serve():
    """Answer requests as long as there are any; returns in each process that is started, with its request."""
    requests, answers = (os.fdopen(os.dup(number), mode) for number, mode in ((0, "r"), (1, "w")))
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    gc.freeze()  # what is there now is never looked through again, nor copied for it
    for line in requests:
        request = json.loads(line)
        if "wait" in request:
            answer = exit_codes(request["wait"])
        else:
            answer = os.fork()
            if not answer:
                requests.close()
                answers.close()
                return request
        print(json.dumps(answer), file=answers, flush=True)
    sys.exit()


ended = {}


def exit_codes(processes):
    """Wait for processes that work together: where one fails, the others would wait for it, and are killed."""
    while set(processes) - ended.keys():
        process, status = os.wait()
        ended[process] = os.waitstatus_to_exitcode(status)
        if process in processes and ended[process]:
            for other in set(processes) - ended.keys():
                os.kill(other, signal.SIGKILL)
    return [ended.pop(process) for process in processes]


def become(script, arguments, folder, environment, files):
    """Make this process what a new one would be that runs the script, and return its main module."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in zip((1, 2), files, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.argv = [script, *arguments]
    paths = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:1] = [str(Path(script).resolve().parent), *map(os.path.abspath, paths)]
    importlib.invalidate_caches()
    with suppress(ImportError):  # of the extra `wandb`, which has a folder for each process that imports it
        from wandb.sdk.data_types._private import MEDIA_TMP

        MEDIA_TMP._finalizer.detach()
        MEDIA_TMP.__init__("wandb-media")
    random.seed()
    numpy.random.seed()  # noqa: NPY002, libraries draw from it
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    main = ModuleType("__main__")  # Lightning and Hydra look at it, and processes that are spawned import its file
    main.__file__ = str(Path(script).absolute())
    sys.modules["__main__"] = main
    return main


def execute(main):
    """Run the file of a module and end the process as Python does, but for taking all libraries down."""
    code = 0
    try:
        exec(compile(Path(main.__file__).read_bytes(), main.__file__, "exec"), vars(main))
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        code = end.code or 0
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    for library in LIBRARIES:
        with suppress(ImportError):  # of an extra
            importlib.import_module(library)
    execute(become(**serve()))
