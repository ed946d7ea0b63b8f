"""Predicted accuracy against measured one, and what prediction leaves alone."""

import random

import pytest
import torch
from scipy.stats import norm
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bnnft import accuracy_over_ber, predict_accuracy_over_ber, predicted_accuracy
from bnnft.ber import Asymmetric, ErrorModel, PerLayer
from bnnft.compensation import Method
from bnnft.model import FC
from bnnft.nn import BinaryActivation, BinaryLinear


def network():
    """Widths that are wide enough for Gaussians, and statistics of its own data."""
    torch.manual_seed(0)
    model = FC((100,), 4, widths=[200, 200]).train()
    with torch.no_grad():
        for _ in range(30):
            model(torch.randn(100, 100))
    return model.eval()


def data(model, samples=300):
    x = torch.randn(samples, 100, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [(part, model.eval()(part).argmax(1)) for part in x.split(100)]


class Foreign(nn.Module):
    """The same by hand: signs by torch.where with a straight-through estimator, and the batch norm by a function."""

    def __init__(self, own):
        super().__init__()
        self.weights = nn.ParameterList(own.get_parameter(f"fc{number}.weight").clone() for number in (1, 2, 3))
        self.norms = nn.ModuleList([own.norm1, own.norm2])

    def forward(self, x):
        for weight, norms in zip(self.weights, [*self.norms, None], strict=True):
            x = nn.functional.linear(x, weight + (torch.where(weight >= 0, 1.0, -1.0) - weight).detach())
            if norms is not None:
                x = norms(x)
                x = x + (torch.where(x >= 0, 1.0, -1.0) - x).detach()
        return x


ERRORS = [
    (None, "rate", [0, 0.02, 0.1, 0.2]),
    (Asymmetric(0, 0.1), "rate_1_to_0", [0.05, 0.2]),
    (PerLayer({"fc1": 0.1, "fc3": Asymmetric(0.2, 0)}), "scale", [0.5, 1.5]),
]


@pytest.mark.parametrize("compensation", [None, "thresholds", "input_sum"])
@pytest.mark.parametrize(("error_model", "axis", "rates"), ERRORS, ids=["symmetric", "asymmetric", "per layer"])
def test_the_mean_over_maps_is_predicted(error_model, axis, rates, compensation):
    """Within three points, and what twelve maps vary by."""
    model = network()
    options = {"error_model": error_model, "axis": axis, "compensation": compensation}
    measured = accuracy_over_ber(model, data(model), rates, 12, **options)
    predicted = predict_accuracy_over_ber(model, data(model), rates, **options)
    assert predicted.clean == measured.clean == 1
    for mean, std, value in zip(measured.mean, measured.std, predicted.mean, strict=True):
        assert abs(mean - value) < 0.03 + norm.isf(5e-7) * std / 12**0.5


def test_layers_of_others_are_predicted_as_ours():
    own = network()
    rates, batches = [0, 0.1, 0.2], data(own)
    expected = predict_accuracy_over_ber(own, batches, rates)
    assert predict_accuracy_over_ber(Foreign(own).eval(), batches, rates).mean == pytest.approx(expected.mean, abs=1e-4)


def test_answers_for_each_token_are_predicted():
    """Of equal tokens as of one."""

    class Tokens(nn.Module):
        def __init__(self, own):
            super().__init__()
            self.own = own

        def forward(self, x):
            hidden = self.own.sign1(self.own.norm1(self.own.fc1(x).transpose(1, 2)))
            hidden = self.own.sign2(self.own.norm2(self.own.fc2(hidden.transpose(1, 2)).transpose(1, 2)))
            return self.own.fc3(hidden.transpose(1, 2)).transpose(1, 2)

    own = network()
    batches = data(own)
    tokens = [(x[:, None].expand(-1, 7, -1), y[:, None].expand(-1, 7)) for x, y in batches]
    expected = predict_accuracy_over_ber(own, batches, [0.1, 0.2])
    assert predict_accuracy_over_ber(Tokens(own), tokens, [0.1, 0.2]).mean == pytest.approx(expected.mean, abs=1e-5)


def test_nothing_is_drawn_or_changed():
    model = network().train()
    model.fc2.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate()
    batches = DataLoader(TensorDataset(*(torch.cat(parts) for parts in zip(*data(network()), strict=True))), 100)
    first = predict_accuracy_over_ber(model, batches, [0.1])
    assert predict_accuracy_over_ber(model, batches, [0.1]).mean == first.mean
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gradients_reach_weights_and_batch_norms_and_a_fit_makes_the_network_tolerant():
    """Accuracy at 20 % as the only loss."""
    model = network()
    batches = data(model)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    start = predict_accuracy_over_ber(model, batches, [0.2]).mean[0]
    for _ in range(20):
        optimizer.zero_grad()
        loss = 1 - predicted_accuracy(model, x, y, 0.2).mean()
        loss.backward()
        assert all(bool(layer.weight.grad.any()) for layer in (model.fc1, model.fc2, model.fc3, model.norm1))
        assert all(bool(weight.grad.isfinite().all()) for weight in model.parameters() if weight.grad is not None)
        optimizer.step()
    assert predict_accuracy_over_ber(model, batches, [0.2]).mean[0] > start + 0.1
    assert accuracy_over_ber(model, batches, [0.2], 5).mean[0] > start + 0.1


class Unknown(ErrorModel):
    def flips(self, weight, key):
        return torch.arange(0, weight.numel(), 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rates": [2]}, r"rate must be a fraction in \[0, 1\], got 2"),
        ({"compensation": "recalibration"}, "recalibration gathers statistics from samples .* can't be predicted"),
        ({"compensation": "magic"}, "kind must be one of"),
        ({"weights": ["lost"]}, "'lost' matches no parameter"),
        ({"dataloader": []}, "needs data, but got no batch"),
        ({"dataloader": [(torch.randn(2, 100), torch.zeros(2))]}, "the targets are no integers"),
    ],
)
def test_bad_arguments_are_one_clear_error(arguments, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        predict_accuracy_over_ber(**{"model": model, "dataloader": data(model), "rates": [0.1], **arguments})


def test_unknown_rates_are_an_error():
    model = network()
    with pytest.raises(ValueError, match="the rates of stored bits of Unknown"):
        predicted_accuracy(model, torch.randn(2, 100), torch.zeros(2, dtype=torch.int64), Unknown())


def test_few_inputs_are_said_to_be_coarse():
    model = nn.Sequential(BinaryLinear(10, 100), BinaryActivation(), BinaryLinear(100, 3)).eval()
    batch = torch.randn(4, 10), torch.zeros(4, dtype=torch.int64)
    with pytest.warns(UserWarning, match=r"the prediction is coarse where neurons have few inputs: 0 \(10\)"):
        predict_accuracy_over_ber(model, [batch], [0.1])


def test_statistics_that_were_gathered_under_errors_are_known_to_it():
    model = network()
    method = Method("thresholds", gathered_at=0.1)
    predicted = predict_accuracy_over_ber(model, data(model), [0, 0.1], compensation=method)
    plain = predict_accuracy_over_ber(model, data(model), [0, 0.1])
    assert predicted.mean[1] == pytest.approx(plain.mean[1])
    assert predicted.mean[0] != plain.mean[0]
