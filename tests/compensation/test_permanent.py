"""A permanent compensation is the one of the context, and lives in batch norms alone."""

import pytest
import torch
from networks import small_net, state
from torch import nn

from bnnft import compensate, compensated, flipped
from bnnft.ber import Asymmetric
from bnnft.injection.gathered import gathered_at
from bnnft.nn import BinaryActivation, BinaryLinear


def trained():
    model = small_net().train()
    torch.manual_seed(1)
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(50, 12))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("shown", [False, True], ids=["by its order", "by an example"])
def test_answers_are_those_of_the_context_and_a_plain_checkpoint_holds_them(shown):
    model, x = trained(), torch.randn(200, 12)
    with flipped(model, 0.2, seed=1), compensated(model, 0.2, "thresholds"):
        expected = model(x).argmax(1)
    before = state(model)
    compensate(model, 0.2, *([x[:2]] if shown else []))
    changed = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert changed == {f"{norm}.running_{what}" for norm in (1, 4) for what in ("mean", "var")}
    fresh = small_net().eval()
    fresh.load_state_dict(model.state_dict())
    with flipped(fresh, 0.2, seed=1):
        assert torch.equal(fresh(x).argmax(1), expected)


@torch.no_grad()
def test_it_starts_from_where_the_last_one_ended():
    model, x = trained(), torch.randn(200, 12)
    before = model(x)
    compensate(model, 0.2)
    assert gathered_at(model)["0.weight"] == (0.2, 0.2)
    with flipped(model, 0.1), compensated(model, 0.1):
        pass
    compensate(model, 0)
    assert torch.allclose(model(x), before, atol=1e-3)


@torch.no_grad()
def test_a_bias_before_the_batch_norm_is_not_scaled():
    torch.manual_seed(0)
    model = nn.Sequential(BinaryLinear(50, 20), nn.BatchNorm1d(20), BinaryActivation(), BinaryLinear(20, 2, bias=False))
    model.train()(torch.randn(100, 50))
    x = torch.randn(40, 50)
    model.eval()[0].bias += 3
    with compensated(model, 0.2, "thresholds"):
        expected = model(x).argmax(1)
    compensate(model, 0.2)
    assert torch.equal(model(x).argmax(1), expected)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.sign, self.out = (
            BinaryLinear(8, 8),
            nn.BatchNorm1d(8),
            BinaryActivation(),
            nn.Linear(8, 2),
        )

    def forward(self, x):
        return self.out(self.sign(self.norm(self.fc(x) + x)))


@pytest.mark.parametrize(
    ("model", "error_model", "inputs", "message"),
    [
        (small_net, Asymmetric(0, 0.2), (), "compensation of 0 can't be permanent.*shifted by -0.2 times the sum"),
        (Residual, 0.1, (), "Residual is no nn.Sequential, whose order says.*give an example"),
        (Residual, 0.1, (torch.ones(2, 8),), "compensation of fc can't be permanent: something is added"),
        (lambda: nn.Sequential(BinaryLinear(4, 2)), 0.1, (), "its class scores have a bias"),
        (lambda: nn.Sequential(BinaryLinear(4, 2), BinaryActivation()), 0.1, (), "there is no batch norm"),
        (small_net, 0.5, (), "nothing is left of the sums with 0.weight"),
    ],
)
def test_what_no_batch_norm_can_hold_is_refused_and_nothing_is_changed(model, error_model, inputs, message):
    model = model().eval()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        compensate(model, error_model, *inputs)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert gathered_at(model) == {}
