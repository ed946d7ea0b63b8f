import json
from contextlib import contextmanager

import merging
import pytest
import torch
from commands import call_on_two_processes
from torch import nn
from torchmetrics import ExplainedVariance

from bnnft.ber import Chip, Independent
from bnnft.evaluation.maps import FaultMaps, Flipping
from bnnft.evaluation.meter import ScoreMeter
from bnnft.evaluation.scores import as_score
from bnnft.nn import BinaryLinear


def network():
    torch.manual_seed(0)
    return nn.Sequential(BinaryLinear(16, 32, bias=False), nn.ReLU(), BinaryLinear(32, 4, bias=False)).eval()


MODELS = [Independent(0.0), Independent(0.4)]


def meter(score=None, models=MODELS, maps=2):
    return ScoreMeter(as_score(score), FaultMaps(network(), models, maps, Flipping()))


X = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
Y = torch.arange(24) % 4


def test_each_run_has_a_context_of_its_own():
    """As autocast needs it: for each run of each batch."""
    entered, depth = [], [0]

    @contextmanager
    def around():
        depth[0] += 1
        entered.append(depth[0])
        yield
        depth[0] -= 1

    measured = meter()
    for start in (0, 8, 16):
        measured.update((X[start : start + 8], Y[start : start + 8]), around)
    assert entered == [1] * (3 * 3)  # clean, which both maps without a flip share, and two maps


def test_two_processes_have_the_curve_of_one():
    """Also where one of them had more data, and where one had none."""
    whole = meter()
    whole.update((X, Y))
    for cut in (9, 24):
        parts = [meter(), meter()]
        for part, rows in zip(parts, (slice(0, cut), slice(cut, 24)), strict=True):
            if len(X[rows]):
                part.update((X[rows], Y[rows]))
        sums = [vars(part._tally).copy() for part in parts]
        for part in parts:
            both = iter([sums[0][name] + sums[1][name] for name in ("sums", "counts", "lost")])
            part.merge(lambda tensor, both=both: next(both))
            curve = part.curve([0, 0.4])
            assert torch.equal(curve.values, whole.curve([0, 0.4]).values)
            assert curve.clean == whole.curve([0, 0.4]).clean
    assert len({*whole.curve([0, 0.4]).values.flatten().tolist()}) > 1


def test_nothing_measured_is_an_error():
    with pytest.raises(ValueError, match="accuracy over BER needs data, but got no batch"):
        meter().curve([0, 0.4])


def test_a_curve_says_what_it_is_of():
    measured = meter(lambda model, batch: (model(batch).sum(), len(batch)), [Chip(0.1, chip=1)], maps=1)
    measured.update(X)
    curve = measured.curve([1], "scale", "mine")
    assert (curve.rates, curve.axis, curve.score, curve.name) == ((1.0,), "scale", "score", "mine")
    assert curve.higher_is_better is None
    assert curve.values.shape == (1, 1)


def test_bounds_that_values_leave_are_none():
    """Explained variance is drawn from 0 to 1, but of a bad prediction it is negative."""
    metric = ExplainedVariance()
    assert (metric.plot_lower_bound, metric.plot_upper_bound) == (0, 1)
    for sign, bounds in ((-1, (float("-inf"), float("inf"))), (1, (0, 1))):
        measured = meter(metric, [Independent(0.0)], maps=1)
        with torch.no_grad():
            measured.update((X, sign * network()(X)))
        curve = measured.curve([0])
        assert curve.clean == pytest.approx(1 if sign > 0 else -3, abs=1e-3)
        assert curve.bounds == bounds


def test_metrics_and_functions_on_two_processes_are_those_of_one(tmp_path):
    """Also where the second process has no data at all."""
    call_on_two_processes(merging.process, tmp_path)
    expected = merging.curves(slice(0, 24), lambda tensor: tensor)
    assert len({*expected["mean_squared_error"]}) > 2
    for rank in (0, 1):
        for found in json.loads((tmp_path / f"{rank}.json").read_text()).values():
            assert found.keys() == expected.keys()
            assert all(found[name] == pytest.approx(expected[name], rel=1e-4) for name in expected)
