"""Curves of compensated runs are those of a plain loop over contexts."""

import pytest
import torch
from networks import loader, small_net, state

from bnnft import accuracy_over_ber, compensated, flipped
from bnnft.ber import Asymmetric, Chip
from bnnft.compensation import Method
from bnnft.evaluation.compensated_maps import fault_maps
from bnnft.evaluation.maps import FaultMaps, Flipping

RATES = [0, 0.1, 0.3]


def network():
    model = small_net().train()
    torch.manual_seed(1)
    with torch.no_grad():
        for _ in range(10):
            model(torch.randn(50, 12))
    return model.eval()


def plain(model, error_model, draw, kind):
    right = 0
    with torch.no_grad(), flipped(model, error_model, seed=3, draw=draw), compensated(model, error_model, kind):
        for x, y in loader():
            right += int((model(x).argmax(1) == y).sum())
    return right / 48


@pytest.mark.parametrize("kind", ["thresholds", "input_sum", "auto"])
@pytest.mark.parametrize("error_model", [Asymmetric(0, 0.1), Chip(0)], ids=str)
def test_each_run_is_compensated_for_its_own_rate(kind, error_model):
    model = network()
    before = state(model)
    curve = accuracy_over_ber(model, loader(), RATES, 2, 3, error_model=error_model, compensation=kind)
    models = [error_model.at_rate(rate) for rate in RATES]
    assert curve.values.tolist() == [[plain(model, each, draw, kind) for draw in range(2)] for each in models]
    assert curve.clean == plain(model, 0, 0, kind)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_recalibration_is_that_of_the_first_samples_under_the_same_map():
    """Sixteen samples are the first two batches."""
    model, batches, method = network(), list(loader()), Method("recalibration", samples=16)
    curve = accuracy_over_ber(model, batches, [0.2], 2, 3, compensation=method)
    for draw in range(2):
        right = 0
        with torch.no_grad(), flipped(model, 0.2, seed=3, draw=draw), compensated(model, 0.2, method, data=batches):
            for x, y in batches:
                right += int((model(x).argmax(1) == y).sum())
        assert curve.values[0, draw] == right / 48


def test_recalibration_on_another_die_is_another_one():
    values = [
        accuracy_over_ber(network(), loader(), [0.25], 3, compensation=Method("recalibration", die=die)).values
        for die in ("same", "other")
    ]
    assert not torch.equal(*values)


def test_fewer_data_than_samples_are_all_taken():
    curve = accuracy_over_ber(network(), loader(), [0.1], 1, compensation="recalibration")
    assert 0 <= curve.mean[0] <= 1


def test_an_error_in_one_run_leaves_the_model_as_it_was():
    model = network()
    before, calls = state(model), 0

    def fail(model, batch):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return model(batch[0]).argmax(1) == batch[1]

    with pytest.raises(KeyboardInterrupt):
        accuracy_over_ber(model, loader(), [0.1], 2, correct=fail, compensation=("input_sum", "recalibration"))
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_is_asked_for_is_checked_and_none_is_none():
    assert Flipping().compensation is Flipping(compensation={}).compensation is None
    assert type(fault_maps(network(), [], 1, Flipping())) is FaultMaps
    with pytest.raises(ValueError, match="target must be 'weights', got 'both'"):
        Flipping(target="both", compensation=Method())
    with pytest.raises(ValueError, match="kind must be one of"):
        accuracy_over_ber(network(), loader(), [0.1], compensation="magic")
