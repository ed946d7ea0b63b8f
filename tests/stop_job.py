"""A callback that sends its process a signal where the environment says so, as a scheduler, a user or a shell does."""

import os
import signal

from lightning import Callback


class Stop(Callback):
    """``STOP_JOB=SIGTERM:PART`` in a batch of the second epoch of the run whose folder has this part in its name."""

    def on_before_backward(self, trainer, pl_module, loss):
        name, _, part = os.environ.get("STOP_JOB", "").partition(":")
        if name and part in trainer.default_root_dir and trainer.current_epoch == 1 and trainer.global_step % 20 == 5:
            os.kill(os.getpid(), signal.Signals[name])
