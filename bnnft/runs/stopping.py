"""End a run when a signal asks for it: with its checkpoint written, and saying so."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_CODE, INTERRUPTED = 143, 130  # what shells give processes that SIGTERM and Ctrl-C ended


class StoppedError(SystemExit):
    """A run was asked to end; no other job of a sweep starts after it.

    Args:
        reason: by what.
        code: of the process.
    """

    def __init__(self, reason: str, code: int = EXIT_CODE) -> None:
        super().__init__(code)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside of the context SIGTERM and SIGUSR1 end a run where it can go on later, and Ctrl-C says that it did.

    While a Trainer runs it ends at the end of a batch, since Lightning takes note of SIGTERM; else at once. Under Slurm
    SIGUSR1 is left to Lightning, which writes a checkpoint and puts the job into the queue again.

    Raises:
        StoppedError: a signal came.
    """
    came: list[str] = []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(signal.Signals(number).name)
        if signal.getsignal(signal.SIGTERM) is stop:
            raise StoppedError(f"stopped by {came[0]}")
        if number != signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)

    earlier = _install(stop)
    try:
        yield
    except StoppedError:
        raise
    except BaseException as error:
        if came and isinstance(error, SystemExit):
            raise StoppedError(f"stopped by {came[0]}") from error
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
            raise StoppedError("interrupted", INTERRUPTED) from error
        raise
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _install(stop: Any) -> dict[int, Any]:
    """Handle the signals by a function; returns what handled them before."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    requeues = "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    numbers = [signal.SIGTERM] if requeues else [signal.SIGTERM, signal.SIGUSR1]
    return {number: signal.signal(number, stop) for number in numbers}
