"""End a run when a signal asks for it: with its checkpoint written, and saying so."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from bnnft.runs.slurm import is_requeued

EXIT_CODE, INTERRUPTED = 143, 130  # what shells give processes that SIGTERM and Ctrl-C ended


class StoppedError(SystemExit):
    """A run was asked to end; no other job of a sweep starts after it.

    Args:
        reason: by what.
        code: of the process.
        requeued: Slurm starts the same job again.
        hand_over: what is left to do once the end is noted: submitit's request to Slurm to start the job again.
    """

    def __init__(
        self,
        reason: str,
        code: int = EXIT_CODE,
        *,
        requeued: bool = False,
        hand_over: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(code)
        self.reason, self.requeued, self.hand_over = reason, requeued, hand_over

    def __str__(self) -> str:
        return self.reason


@contextmanager
def stoppable(note: Callable[[StoppedError], object] = lambda error: None) -> Iterator[None]:
    """Inside of the context SIGTERM and SIGUSR1 end a run where it can go on later, and Ctrl-C says that it did.

    While a Trainer runs it ends at the end of a batch, since Lightning takes note of SIGTERM; else at once. Under Slurm
    SIGUSR1 is left to Lightning, which writes a checkpoint and puts the job into the queue again; the signal by which
    submitit hears that time is out ends the run in the same way as SIGTERM does, and is then given to submitit.

    Args:
        note: called as soon as SIGTERM or another signal comes, since Slurm may kill the process before a batch ends.

    Raises:
        StoppedError: a signal came.
    """
    came: list[StoppedError] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if not came:
            came.append(_stopped(number, earlier.get(number)))
            note(came[0])
        if signal.getsignal(signal.SIGTERM) is stop:
            raise came[0]
        if number != signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)

    earlier: dict[int, Any] = {}
    earlier |= _install(stop)
    try:
        yield
    except StoppedError:
        raise
    except BaseException as error:
        if came and isinstance(error, SystemExit):
            raise came[0] from error
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
            raise StoppedError("interrupted", INTERRUPTED) from error
        raise
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _stopped(number: int, earlier: Any) -> StoppedError:
    """Return by what a run was stopped when this signal came, given who handled it before."""
    if number == _out_of_time():
        return StoppedError("out of time", requeued=True, hand_over=lambda: earlier(number, None))
    if number == signal.SIGTERM and is_requeued():
        return StoppedError("by Slurm", requeued=True)
    return StoppedError(f"stopped by {signal.Signals(number).name}")


def _out_of_time() -> int | None:
    """Return the signal that submitit handles by putting the job into the queue again, in a job that it started."""
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return None
    number = signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]
    return number if callable(signal.getsignal(number)) else None


def _install(stop: Any) -> dict[int, Any]:
    """Handle the signals by a function; returns what handled them before."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    requeues = "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    numbers: set[int] = {signal.SIGTERM} if requeues else {signal.SIGTERM, signal.SIGUSR1}
    if (out_of_time := _out_of_time()) is not None:
        numbers.add(out_of_time)
    return {number: signal.signal(number, stop) for number in numbers}
