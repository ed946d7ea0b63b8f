"""What the callback costs a training step, in units of a step without it.

    python tests/benchmarks/bench_training.py

The network is 784-2048-2048-10 with a batch of 256, on one thread. ``first`` and ``second`` are the batches in which
layers are found and flips are proven, once a run, at a rate of 0.001; a rate of 0 shows what is left in the way of all
others. ``exact`` and ``average`` are the gradients of these names at a rate of 0.1. Times are the best of all steps.

A second table shows layers and whole steps in integers, in units of the same in float without flips: processor time,
in turns, the best of all. Batches are 256 images of 28x28 as ``(u - 128) / 128``; layers are given signs.
"""

import logging
import sys
import time
import warnings
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).parents[1] / "foreign"))
import patterns

from bnnft.callbacks import BitFlipTraining
from bnnft.injection.training import BitFlips
from bnnft.model import FC, VGG3
from bnnft.nn import BinaryActivation, BinaryConv2d, BinaryLinear, integers

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


FORWARDS = {
    "linear, 784 to 2048": (lambda: BinaryLinear(784, WIDTH, bias=False), (BATCH, 784)),
    "linear, 2048 to 2048": (lambda: BinaryLinear(WIDTH, WIDTH, bias=False), (BATCH, WIDTH)),
    "3x3, 64 to 64, 14x14": (lambda: BinaryConv2d(64, 64, 3, padding=1, bias=False), (BATCH, 64, 14, 14)),
    "3x3, 128 to 128, 16x16": (lambda: BinaryConv2d(128, 128, 3, padding=1, bias=False), (64, 128, 16, 16)),
}
NETWORKS = {
    "step, 784-2048-2048-10": (
        lambda: FC((1, 28, 28), 10, widths=[WIDTH, WIDTH]),
        {"plain": 0.80, 0.1: 0.88, 0.3: 0.88},
    ),
    "step, VGG3": (lambda: VGG3((1, 28, 28), 10), {"plain": 0.85, 0.1: None, 0.3: None}),
}


def forward(build, shape):
    """Return a call of a layer on signs."""
    layer, x = build(), torch.randn(shape).sign()
    return torch.no_grad()(lambda: layer(x))


def step(build, rate):
    """Return a training step, with flips unless the rate is plain."""
    torch.manual_seed(0)
    model, x, y = build(), torch.randint(256, (BATCH, 1, 28, 28)).sub(128) / 128, torch.randint(10, (BATCH,))
    optimizer, training = (
        torch.optim.Adam(model.parameters(), fused=True),
        BitFlips(model, rate if rate != "plain" else 0),
    )

    def run():
        optimizer.zero_grad()
        with nullcontext() if rate == "plain" else training.batch():
            nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return run


def ratios(plain, runs, rounds):
    """Return the processor time of runs in integers, by that of a plain one in float."""
    best = dict.fromkeys([None, *runs], float("inf"))
    for _ in range(rounds):
        for name, run in {None: plain, **runs}.items():
            integers.devices.clear() if name is None else integers.devices.add("cpu")
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    return {name: best[name] / best[None] for name in runs}


def integer_rows():
    """Yield names, ratios and what they may be at most."""
    for name, (build, shape) in FORWARDS.items():
        run = forward(build, shape)
        yield name, ratios(run, {"forward": run}, 10 * STEPS)["forward"], None
    for name, (build, bars) in NETWORKS.items():
        found = ratios(step(build, "plain"), {rate: step(build, rate) for rate in bars}, 2 * STEPS)
        for rate, bar in bars.items():
            yield name if rate == "plain" else f"{name}, flips {rate:.0%}", found[rate], bar


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
        plain_step = min(plain)
        first, second = (min(batches[number] for batches in found) / plain_step for number in (0, 1))
        rest = "  ".join(f"{min(times[kind]) / plain_step:8.3f}" for kind in kinds)
        print(f"{name:<22} {1e3 * plain_step:4.0f} ms  {first:6.2f}  {second:6.2f}  {rest}")
    print(f"\n{'in integers':<36} {'by float':>8}  at most")
    for name, ratio, bar in integer_rows():
        print(
            f"{name:<36} {ratio:8.3f}  " + ("" if bar is None else f"{bar:7.2f} {'held' if ratio <= bar else 'MISSED'}")
        )


if __name__ == "__main__":
    main()
