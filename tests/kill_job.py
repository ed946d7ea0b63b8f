"""A callback that kills its process where the environment says so, as when the power fails."""

import os
import signal

from lightning import Callback


class Kill(Callback):
    """In the middle of a batch of the second epoch, if ``KILL_JOB`` is part of the name of the run's folder."""

    def on_before_backward(self, trainer, pl_module, loss):
        name = os.environ.get("KILL_JOB")
        if name and name in trainer.default_root_dir and trainer.current_epoch == 1 and trainer.global_step % 20 == 5:
            os.kill(os.getpid(), signal.SIGKILL)
