"""A callback that lets Slurm end its job where the environment says so, in the middle of a batch."""

import os
import subprocess

from lightning import Callback

COMMANDS = {
    "requeue": ["scontrol", "requeue"],
    "out of time": ["scancel", "--signal=USR2"],  # what Slurm sends before the time is out, as submitit asks it to
    "cancel": ["scancel"],
}


class AskSlurm(Callback):
    """``ASK_SLURM=requeue:PART,cancel:PART`` in the second epoch of runs with these parts in their folders."""

    def on_before_backward(self, trainer, pl_module, loss):
        if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
            return
        for each in filter(None, os.environ.get("ASK_SLURM", "").split(",")):
            command, _, part = each.partition(":")
            if part in trainer.default_root_dir and trainer.current_epoch == 1 and trainer.global_step % 20 == 5:
                array = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
                subprocess.run([*COMMANDS[command], array], check=True)
