"""Accuracy over BER of a trained FC, predicted without a fault map and measured with some, and what both cost.

python tests/benchmarks/bench_prediction.py outputs/.../checkpoints/best.ckpt --gathered-at 0.1 --maps 20
"""

import argparse
import statistics
import time
import warnings

import torch
from bench_compensation import first_batches, network

from bnnft import accuracy_over_ber, predict_accuracy_over_ber
from bnnft.ber import Asymmetric, Independent
from bnnft.compensation import Method

CURVES = [
    (Independent(0.1), "rate", [0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]),
    (Asymmetric(0, 0.1), "rate_1_to_0", [0.02, 0.05, 0.1, 0.2, 0.3]),
    (Asymmetric(0.15, 0.075), "rate", [0.1125, 0.225]),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--gathered-at", type=float, default=0.0, help="BER that the network was trained at")
    parser.add_argument("--compensation", default=None)
    parser.add_argument("--maps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--data", default="data")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    batches = first_batches(given.data, given.samples)
    model = network("fc", given.checkpoint)
    method = None if given.compensation is None else Method(given.compensation, gathered_at=given.gathered_at)
    errors, seconds = [], {"predicted": 0.0, "measured": 0.0}
    for error_model, axis, rates in CURVES:
        own = {"error_model": error_model, "axis": axis, "compensation": method}
        start = time.perf_counter()
        predicted = predict_accuracy_over_ber(model, batches, rates, **own)
        middle = time.perf_counter()
        measured = accuracy_over_ber(model, batches, rates, given.maps, 77, **own)
        seconds["predicted"] += middle - start
        # each map of each rate is a run, but those of a rate of 0, which are the clean one
        runs = 1 + given.maps * sum(rate > 0 for rate in rates)
        seconds["measured"] += (time.perf_counter() - middle) * (1 + 50 * sum(rate > 0 for rate in rates)) / runs
        for rate, *means in zip(rates, measured.mean, predicted.mean, strict=True):
            errors.append(100 * abs(means[0] - means[1]))
            shown = f"measured {100 * means[0]:.1f}, predicted {100 * means[1]:.1f}, off by {errors[-1]:.1f}"
            print(f"{error_model.at(axis, rate)}: {shown}", flush=True)
    print(f"median error {statistics.median(errors):.2f}, largest {max(errors):.2f} points")
    print(f"50 maps cost {seconds['measured'] / seconds['predicted']:.1f} times as much as the prediction")


if __name__ == "__main__":
    main()
