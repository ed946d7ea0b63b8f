"""Test a small project on several processes, with compensated and predicted curves.

    python distributed_compensation.py PROCESSES FOLDER

The first process writes the test metrics.
"""

import sys
import warnings
from pathlib import Path

import torch
from networks import Project, loader, small_net, trainer

from bnnft.ber import Asymmetric
from bnnft.callbacks import AccuracyOverBER, Compensation, PredictedAccuracyOverBER


def main(processes, folder):
    warnings.simplefilter("ignore")  # neurons of few inputs
    errors, rates, kind = Asymmetric(0.05, 0.3), [0, 0.1, 0.3], "input_sum"
    callbacks = [
        Compensation(errors, kind),
        AccuracyOverBER(rates, maps=2, error_model=errors, compensation=kind),
        PredictedAccuracyOverBER(rates, error_model=errors, compensation=kind),
    ]
    run = trainer(folder, callbacks, strategy="ddp" if processes > 1 else "auto", devices=processes)
    run.test(Project(small_net()), loader(8), verbose=False)
    if run.is_global_zero:
        metrics = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("test/")}
        torch.save(metrics, Path(folder) / "metrics.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), sys.argv[2])
