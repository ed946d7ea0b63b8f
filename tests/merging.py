"""Measure scores on two processes, once with data on both and once on the first alone.

Each process writes the curve that it has after merging, as all of them do.
"""

import json
from pathlib import Path

import torch
from torch import distributed, nn
from torchmetrics import MeanSquaredError, PearsonCorrCoef

from bnnft.ber import Independent
from bnnft.evaluation.maps import FaultMaps, Flipping
from bnnft.evaluation.meter import ScoreMeter
from bnnft.evaluation.scores import as_score
from bnnft.nn import BinaryLinear

X = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
Y = torch.randn(24, generator=torch.Generator().manual_seed(2))


def absolute_error(model, batch):
    return (model(batch[0]) - batch[1]).abs().sum(), len(batch[1])


def curves(rows, reduce):
    """One curve for each kind of tally."""
    torch.manual_seed(0)
    model = nn.Sequential(BinaryLinear(16, 32, bias=False), nn.ReLU(), BinaryLinear(32, 1, bias=False), nn.Flatten(0))
    found = {}
    for score in (MeanSquaredError(), PearsonCorrCoef(), absolute_error):
        models = [Independent(0.0), Independent(0.3)]
        meter = ScoreMeter(as_score(score, higher_is_better=False), FaultMaps(model.eval(), models, 2, Flipping()))
        with torch.no_grad():
            for start in range(rows.start, rows.stop, 6):
                own = slice(start, min(start + 6, rows.stop))
                meter.update((X[own], Y[own]))
        meter.merge(reduce)
        curve = meter.curve([0, 0.3])
        found[curve.score] = [curve.clean, *curve.values.flatten().tolist()]
    return found


def summed(tensor):
    distributed.all_reduce(tensor)
    return tensor


def process(rank, folder):
    distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {}
    for samples in (9, 24):
        rows = slice(0, samples) if rank == 0 else slice(samples, 24)
        found[samples] = curves(rows, summed)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()
