"""Train with shuffled data: ``python killed.py LAYER FOLDER RATE [STEP]``; killed in this step, or resumed."""

import os
import signal
import sys
from pathlib import Path

import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import Project, small_data, small_net, state, trainer
from patterns import Centred, SignFunction
from torch import nn
from torch.utils.data import DataLoader

from bnnft.callbacks import BitFlipTraining, ToleranceMetrics
from bnnft.dataset.in_memory import ShuffledByEpoch
from bnnft.nn import BinaryActivation


class Kill(Callback):
    """No handler runs, no file is closed: as when the power fails."""

    def __init__(self, step):
        self.step = step

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def network(layer, seed):
    if layer == "BinaryLinear":
        return small_net(seed)
    torch.manual_seed(seed)
    kind = {"SignFunction": SignFunction, "Centred": Centred}[layer]
    return nn.Sequential(kind(12, 16), nn.BatchNorm1d(16), BinaryActivation(), kind(16, 8), nn.Linear(8, 3))


def main(layer, folder, rate, step=-1):
    data = small_data()
    loader = DataLoader(data, batch_size=8, sampler=ShuffledByEpoch(len(data), seed=5))
    checkpoint = ModelCheckpoint(folder, save_last=True)
    callbacks = [BitFlipTraining(float(rate)), ToleranceMetrics(), checkpoint, Kill(int(step))]
    last = Path(folder, "last.ckpt")
    module = Project(network(layer, 9 if last.exists() else 0))  # what a resumed run starts with does not matter
    run = trainer(folder, callbacks, max_epochs=3, enable_checkpointing=True)
    run.fit(module, loader, loader, ckpt_path=last if last.exists() else None)
    torch.save(state(module), Path(folder, "weights.pt"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
