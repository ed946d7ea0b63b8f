"""What the callback costs a training step, in units of a step without it.

    python tests/benchmarks/bench_training.py

The network is 784-2048-2048-10 with a batch of 256, on one thread. ``first`` and ``second`` are the batches in which
layers are found and flips are proven, once a run; a rate of 0 shows what is left in the way of all others. Times are
the best of all steps.
"""

import logging
import sys
import time
import warnings
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
    "bnnft.nn, latent": (lambda inputs, outputs: BinaryLinear(inputs, outputs, bias=False), "latent"),
    "hand-written, latent": (patterns.SignFunction, "latent"),
    "hand-written, operand": (patterns.Scaled, "operand"),
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
    print("layers                   step    first  second  rate 0  rate 0.1")
    for name, (layer, how) in LAYERS.items():
        plain, zero, flips, found = [], [], [], []
        for _ in range(RUNS):  # in turns, so that a machine that slows down does so for all
            plain += seconds(layer)[2:]
            times = seconds(layer, BitFlipTraining(0.0, how=how))
            zero, found = zero + times[2:], [*found, times[:2]]
            flips += seconds(layer, BitFlipTraining(0.1, how=how))[2:]
        step = min(plain)
        first, second = (min(times[batch] for times in found) / step for batch in (0, 1))
        rest = (min(times) / step for times in (zero, flips))
        print(f"{name:<22} {1e3 * step:4.0f} ms  {first:6.2f}  {second:6.2f}  " + "  ".join(f"{r:6.3f}" for r in rest))


if __name__ == "__main__":
    main()
