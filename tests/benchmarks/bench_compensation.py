"""Accuracy of trained networks under errors that are compensated without retraining: a table for each checkpoint.

    python tests/benchmarks/bench_compensation.py outputs/.../checkpoints/best.ckpt --gathered-at 0.1 --maps 10

Arguments are checkpoints of ``train.py`` on Fashion-MNIST, of ``model=fc`` unless ``--model`` says otherwise.
"""

import argparse
import time
import warnings

import torch

from bnnft import accuracy_over_ber
from bnnft.ber import Asymmetric, PerLayer
from bnnft.compensation import Method
from bnnft.dataset import FashionMNIST
from bnnft.model import FC, VGG3

ERRORS = [(0, 0), (0.05, 0.05), (0.1, 0.1), (0.15, 0.15), (0.2, 0.2), (0.3, 0.3)]
ERRORS += [(0, 0.1), (0, 0.2), (0, 0.4), (0.15, 0.075)]
METHODS = {
    "none": None,
    "thresholds": Method("thresholds"),
    "input_sum": Method("input_sum"),
    "recalibration": Method("recalibration"),
    "other die": Method("recalibration", die="other"),
    "input_sum, recalibration": Method(("input_sum", "recalibration")),
    "auto": Method("auto"),
}


def first_batches(folder, samples):
    """Return the first test images of Fashion-MNIST in batches."""
    data = FashionMNIST(data_dir=folder)
    data.prepare_data()
    data.setup("test")
    x, y = map(torch.cat, zip(*data.test_dataloader(), strict=True))
    return list(zip(x[:samples].split(500), y[:samples].split(500), strict=True))


def network(kind, path):
    saved = torch.load(path, weights_only=False)["state_dict"]
    weights = {name.removeprefix("model."): value for name, value in saved.items() if name.startswith("model.")}
    if kind == "fc":
        model = FC((1, 28, 28), 10)
    else:
        model = VGG3((1, 28, 28), 10, len(weights["conv1.weight"]), len(weights["fc1.weight"]))
    model.load_state_dict(weights)
    return model.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--model", choices=["fc", "vgg3"], default="fc")
    parser.add_argument("--gathered-at", type=float, default=0.0, help="BER that the networks were trained at")
    parser.add_argument("--maps", type=int, default=10)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--data", default="data")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--errors", nargs="+", help="pairs p01,p10", default=None)
    parser.add_argument("--right", default=None, help="pattern of layers that have no errors")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    batches = first_batches(given.data, given.samples)
    errors = ERRORS if given.errors is None else [tuple(map(float, pair.split(","))) for pair in given.errors]
    for path in given.checkpoints:
        model, start = network(given.model, path), time.perf_counter()
        print(path, "| p01, p10 |", " | ".join(given.methods), flush=True)
        for zeros, ones in errors:
            cells = []
            for name in given.methods:
                method = METHODS[name]
                if method is not None:
                    method = Method(method.kind, method.samples, method.die, given.gathered_at)
                error_model = PerLayer({"*": Asymmetric(zeros, ones), **({given.right: 0.0} if given.right else {})})
                curve = accuracy_over_ber(
                    model, batches, [1], given.maps, 77, error_model=error_model, axis="scale", compensation=method
                )
                cells.append(f"{100 * curve.mean[0]:.1f}")
            print(f"{zeros:g}, {ones:g} |", " | ".join(cells), flush=True)
        print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
