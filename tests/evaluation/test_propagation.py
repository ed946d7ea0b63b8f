"""Each step of the propagation against Monte Carlo, and what has no closed form."""

import pytest
import torch
import torch.nn.functional as F
from monte_carlo import INPUTS, NEURONS, assert_moments, read
from torch import nn

from bnnft.evaluation.moments import Errors
from bnnft.evaluation.propagation import Propagation
from bnnft.injection.finder import Finder
from bnnft.injection.sites import first_names
from bnnft.nn import BinaryActivation, BinaryConv2d, BinaryLinear
from bnnft.tracing.trace import Trace


def propagated(model, x, errors, hold=False):
    model = model.eval()
    finder = Finder(model)
    with finder, torch.no_grad():
        model(x)
    first = first_names(finder.model)
    sites = [site for site in finder.findings.sites() if first[site.name] in finder.findings.uses]
    trace = Trace(model)
    with torch.set_grad_enabled(hold), trace:
        output = model(x)
    return Propagation(trace, output, sites).moments({site.name: Errors(errors) for site in sites})


class Normed(nn.Module):
    """What stands behind one layer: batch norm with signs of gamma, a scale, reshaping."""

    def __init__(self, last):
        super().__init__()
        self.fc, self.last = BinaryLinear(INPUTS, NEURONS), last
        self.norm = nn.BatchNorm1d(NEURONS)
        with torch.no_grad():
            self.norm.running_mean += torch.randn(NEURONS)
            self.norm.running_var *= 9
            self.norm.weight[1] = -2

    def forward(self, x):
        return self.last(self, x)


LASTS = {
    "batch norm": lambda self, x: self.norm(self.fc(x)),
    "scaled": lambda self, x: -(3 * self.fc(x)) / 2,
    "shaped": lambda self, x: self.fc(x).view(-1, 2, 2).transpose(1, 2).flatten(1)[:, 1:],
    "added to what is certain": lambda self, x: self.norm(self.fc(x) + x[:, :NEURONS]),
    "tokens": lambda self, x: self.norm(self.fc(x[:, None].expand(-1, 3, -1)).transpose(1, 2)),
    "in place": lambda self, x: self.fc(x).mul_(2).add_(1),
}


@pytest.mark.parametrize("name", LASTS)
def test_what_stands_behind_a_layer_moves_moments_as_it_moves_draws(name):
    torch.manual_seed(0)
    model, x = Normed(LASTS[name]), torch.randn(2, INPUTS)
    moments = propagated(model, x, (0.1, 0.3))
    weights = read(model.fc.weight.detach().sign(), (0.1, 0.3), torch.Generator().manual_seed(3))
    samples = []
    with torch.no_grad():
        for weight in weights:
            model.fc.weight.copy_(weight)
            samples.append(model(x))
    assert_moments(torch.stack(samples), moments)


@torch.no_grad()
def test_without_errors_the_moments_are_the_forward():
    torch.manual_seed(0)
    hidden = BinaryLinear(12, 64), nn.BatchNorm1d(64), nn.Hardtanh(), BinaryActivation(), nn.Dropout(0.5)
    model, x = nn.Sequential(*hidden, BinaryLinear(64, 3)).eval(), torch.randn(5, 12)
    moments = propagated(model, x, (0.0, 0.0))
    assert torch.allclose(moments.mean, model(x), atol=1e-4)
    assert float(moments.spread.max()) <= 1e-3


class Residual(nn.Module):
    """Two branches that meet before a sign, and one that comes from a sign."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (BinaryLinear(n, 400, bias=False) for n in (300, 400, 400))
        self.out = BinaryLinear(400, 3, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm1d(400) for _ in range(3))
        self.sign = BinaryActivation()

    def forward(self, x):
        first = self.sign(self.norms[0](self.a(x)))
        second = self.sign(self.norms[1](self.b(first)) + first)
        return self.out(self.sign(self.norms[2](self.c(second)) + second))


@torch.no_grad()
def test_sums_of_branches_are_predicted():
    """Class scores of 200 dies, whose inputs are not quite independent: within a tenth of their deviation."""
    torch.manual_seed(0)
    model, x = Residual().train(), torch.randn(64, 300)
    model(x)
    moments = propagated(model, x[:8], (0.1, 0.1))
    layers = [model.a, model.b, model.c, model.out]
    clean = [layer.weight.clone() for layer in layers]
    samples = []
    for _ in range(200):
        for layer, weight in zip(layers, clean, strict=True):
            layer.weight.copy_(torch.where(torch.rand_like(weight) < 0.1, -weight, weight))
        samples.append(model(x[:8]))
    samples = torch.stack(samples)
    assert float(((samples.mean(0) - moments.mean).abs() / moments.spread).max()) < 0.1 + 4.9 / 200**0.5
    assert float((samples.std(0).mean() / moments.spread.mean() - 1).abs()) < 0.15


class Other(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.fc, self.norm, self.function = BinaryLinear(INPUTS, NEURONS), nn.BatchNorm1d(NEURONS), function

    def forward(self, x):
        return self.function(self, x)


CONV = nn.Sequential(BinaryConv2d(1, 2, 3), nn.Flatten(), BinaryLinear(2 * 36, 3))
POOLED = nn.Sequential(BinaryLinear(INPUTS, 8), nn.MaxPool1d(2), BinaryLinear(4, 3))


X = torch.randn(5, INPUTS, generator=torch.Generator().manual_seed(5))
UNNORMED = Other(lambda s, x: F.batch_norm(s.fc(x), None, None, training=True))


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (CONV, torch.randn(2, 1, 8, 8), r"through 0 \(conv2d\): a flip in a small kernel moves a whole channel"),
        (POOLED, X, r"through 1 \(max_pool1d\): mean and variance have no closed form"),
        (Other(lambda s, x: s.fc(x).relu()), X, r"through Other \(relu\): mean and variance have no"),
        (UNNORMED, X, "through Other .* it has no running statistics"),
        (Other(lambda s, x: (y := s.fc(x)) + y), X, "it adds a value to itself"),
        (Other(lambda s, x: s.fc(x) * s.fc(x + 1)), X, r"\(mul\): mean and variance have no closed"),
        (Other(lambda s, x: (s.fc(x), x * 2)[1]), X, "do not depend on binarized weights"),
    ],
)
def test_what_has_no_closed_form_is_refused_by_name(model, x, message):
    with pytest.raises(ValueError, match=message):
        propagated(model, x, (0.1, 0.1))
