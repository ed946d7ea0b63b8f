"""Accuracy of a trained FC under errors that the memory makes harmless: scrambled, corrected, or with protected cells.

python tests/benchmarks/bench_protection.py outputs/.../checkpoints/best.ckpt --maps 10
"""

import argparse
import math

import torch
from bench_compensation import network
from scipy.stats import t

from bnnft import accuracy_over_ber, protection_scores
from bnnft.ber import Asymmetric, Protected, Scrambled, Secded
from bnnft.dataset import FashionMNIST


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--maps", type=int, default=10)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--data", default="data")
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = FashionMNIST(data_dir=given.data)
    data.prepare_data()
    data.setup("test")
    x, y = map(torch.cat, zip(*data.test_dataloader(), strict=True))
    batches = list(zip(x[: given.samples].split(500), y[: given.samples].split(500), strict=True))
    model = network("fc", given.checkpoint)

    def measured(error_model, compensation=None):
        options = {"error_model": error_model, "axis": "scale", "compensation": compensation}
        return accuracy_over_ber(model, batches, [1], given.maps, 77, **options)

    for rate in (0.1, 0.2, 0.3):
        plain, scaled = (measured(Scrambled(Asymmetric(0, rate)), kind) for kind in (None, "thresholds"))
        print(
            f"scrambled, p10 = {rate:g}: {100 * plain.mean[0]:.1f}, thresholds {100 * scaled.mean[0]:.1f}", flush=True
        )
    for rate in (0.01, 0.05, 0.1):
        code = Secded(rate)
        shown = f"read at {100 * code.bit_rates()[0]:.2f} %, overhead {100 * code.overhead:g} %"
        print(f"secded, p = {rate:g}: {100 * measured(code).mean[0]:.1f} ({shown})", flush=True)
    data.setup("fit")
    train = next(iter(data.val_dataloader()))
    scores = {by: protection_scores(model, [train], by) for by in ("importance", "margin")}
    for share in (0.1, 0.25, 0.5):
        maps = {"random": measured(Protected(0.15, share))}
        maps |= {by: measured(Protected(0.15, share, scores=scores[by])) for by in scores}
        for by, curve in maps.items():
            gain = 100 * (curve.values[0] - maps["random"].values[0])
            wide = float(t.ppf(0.975, given.maps - 1) * gain.std() / math.sqrt(given.maps))
            text = f"{100 * curve.mean[0]:.1f}, over random {float(gain.mean()):+.1f} +- {wide:.1f}"
            print(f"protected, p = 0.15, share {share:g}, by {by}: {text}", flush=True)


if __name__ == "__main__":
    main()
