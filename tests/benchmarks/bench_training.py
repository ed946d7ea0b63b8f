"""What the callback costs a training step, in units of a step without it.

    python tests/benchmarks/bench_training.py

The network is 784-2048-2048-10 with a batch of 256, on one thread. ``first`` and ``second`` are the batches in which
layers are found and flips are proven, once a run, at a rate of 0.001; a rate of 0 shows what is left in the way of all
others. ``exact`` and ``average`` are the gradients of these names at a rate of 0.1. Times are the best of all steps.
"""

import logging
import sys
import time
import warnings
from copy import deepcopy
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).parents[1] / "foreign"))
import patterns

from bnnft.callbacks import BitFlipTraining
from bnnft.nn import BinaryActivation, BinaryLinear

STEPS, RUNS, WIDTH, BATCH = 20, 4, 2048, 256
LAYERS = {
    "bnnft.nn": (lambda inputs, outputs: BinaryLinear(inputs, outputs, bias=False), "auto"),
    "hand-written": (patterns.SignFunction, "auto"),
    "hand-written, centred": (patterns.Scaled, "auto"),
    "hand-written, latent": (patterns.SignFunction, "latent"),
}


class Times(Callback):
    """Takes the time of each batch, other callbacks' work included."""

    def __init__(self):
        self.seconds = []

    def on_train_batch_start(self, *args):
        self.start = time.perf_counter()

    def on_train_batch_end(self, *args):
        self.seconds.append(time.perf_counter() - self.start)


class Net(LightningModule):
    def __init__(self, layer):
        super().__init__()
        widths = ((784, WIDTH), (WIDTH, WIDTH))
        parts = [part for a, b in widths for part in (layer(a, b), nn.BatchNorm1d(b), BinaryActivation())]
        self.net = nn.Sequential(*parts, nn.Linear(WIDTH, 10))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), fused=True)


def seconds(layer, *callbacks):
    """Return the time of each batch of a run."""
    times, samples = Times(), STEPS * BATCH
    data = TensorDataset(torch.randn(samples, 784), torch.randint(10, (samples,)))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    run = Trainer(accelerator="cpu", max_epochs=1, callbacks=[times, *callbacks], enable_model_summary=False, **quiet)
    run.fit(Net(layer), DataLoader(data, batch_size=BATCH))
    return times.seconds


def main():
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    names = ("rate 0", "rate 0.1", "exact", "average")
    print(f"{'layers':<22} {'step':>7}  {'first':>6}  {'second':>6}  " + "  ".join(f"{name:>8}" for name in names))
    for name, (layer, how) in LAYERS.items():
        kinds = {
            "rate 0": BitFlipTraining(0.0, how=how),
            "rate 0.1": BitFlipTraining(0.1, how=how),
            "exact": BitFlipTraining(0.1, how=how, gradient="exact"),
            "average": BitFlipTraining(0.1, how=how, gradient="average"),
        }
        plain, times, found = [], {kind: [] for kind in kinds}, []
        for _ in range(RUNS):  # in turns, so that a machine that slows down does so for all
            plain += seconds(layer)[2:]
            found.append(seconds(layer, BitFlipTraining(0.001, how=how))[:2])  # few flips: there must be some to prove
            for kind, callback in kinds.items():
                times[kind] += seconds(layer, deepcopy(callback))[2:]
        step = min(plain)
        first, second = (min(batches[number] for batches in found) / step for number in (0, 1))
        rest = "  ".join(f"{min(times[kind]) / step:8.3f}" for kind in kinds)
        print(f"{name:<22} {1e3 * step:4.0f} ms  {first:6.2f}  {second:6.2f}  {rest}")


if __name__ == "__main__":
    main()
