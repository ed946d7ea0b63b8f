"""Sums are as without errors on average, and nothing stays of it.

Means over draws are held against normal tests: each fails by chance with a probability of 1e-9, for a fixed seed.
"""

import copy
import pickle

import patterns
import pytest
import torch
import torch.nn.functional as F
from networks import equal_states, small_net, state
from scipy.stats import norm
from torch import nn

from bnnft import compensated, flipped
from bnnft.ber import Asymmetric, Chip, ErrorModel, Independent, PerLayer
from bnnft.compensation import Method
from bnnft.nn import BinaryActivation, BinaryConv2d, BinaryLinear

FARTHEST = float(norm.isf(0.5e-9))
ERRORS = [Independent(0.2), Asymmetric(0, 0.3), Asymmetric(0.4, 0.1), Chip(0.4, kind="stuck_at", stuck_at_1=0.1)]


class Scaled(nn.Linear):
    """XNOR-Net's: signs times the mean magnitude of each neuron, written by hand."""

    def forward(self, x):
        sign = torch.where(self.weight >= 0, 1.0, -1.0)
        ste = self.weight + (sign - self.weight).detach()
        return F.linear(x, ste * self.weight.detach().abs().mean(1, keepdim=True), self.bias)


class FromTheRight(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(40, 6))

    def forward(self, x):
        return x @ (self.kernel + (torch.where(self.kernel >= 0, 1.0, -1.0) - self.kernel).detach())


LAYERS = {
    "linear": (lambda: BinaryLinear(40, 6, bias=False), (3, 40)),
    "with a bias": (lambda: BinaryLinear(40, 6), (3, 40)),
    "tokens": (lambda: BinaryLinear(40, 6), (3, 5, 40)),
    "convolution": (lambda: BinaryConv2d(4, 6, 3, padding=1, bias=False), (2, 4, 5, 5)),
    "groups, stride and a bias": (lambda: BinaryConv2d(4, 6, 3, stride=2, groups=2), (2, 4, 7, 7)),
    "one image": (lambda: BinaryConv2d(4, 6, 3), (4, 5, 5)),
    "scaled by hand": (lambda: Scaled(40, 6), (3, 40)),
    "from the right": (FromTheRight, (3, 40)),
}


def built(name):
    torch.manual_seed(3)
    build, shape = LAYERS[name]
    return nn.Sequential(build()).eval(), torch.randn(shape) + 0.5


@pytest.mark.parametrize("error_model", ERRORS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_sums_under_errors_are_the_clean_ones_on_average(name, error_model):
    """Over 60 dies, for all outputs together: the mean difference, in units of its standard error."""
    model, x = built(name)
    clean, far = model(x), []
    with compensated(model, error_model, "input_sum"):
        for draw in range(60):
            with flipped(model, error_model, draw=draw):
                far.append((model(x) - clean).mean())
    far = torch.stack(far)
    assert far.std() > 0
    assert float(far.mean().abs() / far.std() * len(far) ** 0.5) < FARTHEST
    assert torch.equal(model(x), clean)


@torch.no_grad()
def test_without_it_they_are_not():
    model, x = built("linear")
    far = []
    for draw in range(60):
        with flipped(model, Asymmetric(0, 0.3), draw=draw):
            far.append((model(x) - model(x)).mean() if draw < 0 else model(x).mean())
    far = torch.stack(far) - model(x).mean()
    assert float(far.mean().abs() / far.std() * len(far) ** 0.5) > FARTHEST


def signs_under(model, x, error_model, kind, **options):
    with torch.no_grad(), flipped(model, error_model, seed=4), compensated(model, error_model, kind, **options):
        return model(x)


@torch.no_grad()
def test_thresholds_are_those_of_scaled_statistics():
    """Dividing sums by what is left of them is scaling means by it, and variances by its square."""
    model, x = small_net().train(), torch.randn(200, 12)
    model(x)
    model.eval()
    got = signs_under(model, x, 0.2, "thresholds")
    for layer in (1, 4):
        model[layer].running_mean *= 0.6
        model[layer].running_var *= 0.36
        model[layer].eps *= 0.36
    with flipped(model, 0.2, seed=4):
        expected = model(x)
    assert torch.equal((got * 0.6).round(), expected.round())


@torch.no_grad()
def test_statistics_gathered_under_errors_are_taken_back():
    """By the argument; the same as scaling for no errors from there."""
    model, x = small_net().eval(), torch.randn(50, 12)
    with compensated(model, 0, Method("thresholds", gathered_at=0.1)):
        got = model(x)
    for layer in (1, 4):
        model[layer].running_mean /= 0.8
        model[layer].running_var /= 0.64
        model[layer].eps /= 0.64
    assert torch.allclose(got * 1.25, model(x), atol=1e-4)


@pytest.mark.parametrize("kind", ["thresholds", "input_sum", "auto", ("input_sum", "recalibration")])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_after_any_exit(kind, fails):
    model, x = small_net().eval(), torch.randn(30, 12)
    clean, before, attributes = model(x), state(model), [set(vars(module)) for module in model.modules()]
    try:
        with compensated(model, Asymmetric(0, 0.2), kind, data=[x]):
            assert not torch.equal(model(x), clean)
            assert equal_states(state(model), before)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert torch.equal(model(x), clean)
    assert equal_states(state(model), before)
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_an_error_in_the_first_forward_leaves_nothing():
    model = small_net().eval()
    with pytest.raises(RuntimeError), compensated(model, 0.1):
        model(torch.randn(2, 5))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("known", [False, True], ids=["found inside", "found before"])
def test_flips_compose_in_any_order(foreign, known):
    torch.manual_seed(0)
    model = small_net().eval()
    if foreign:
        model = nn.Sequential(Scaled(12, 16), nn.BatchNorm1d(16), BinaryActivation(), Scaled(16, 3)).eval()
    x, errors, got = torch.randn(40, 12), Asymmetric(0.05, 0.2), []
    if known:
        with flipped(model, errors):
            model(x)
    with flipped(model, errors, seed=2), compensated(model, errors):
        got.append(model(x))
    with compensated(model, errors), flipped(model, errors, seed=2):
        got.append(model(x))
    with compensated(model, errors):
        model(x)
        with flipped(model, errors, seed=2):
            got.append(model(x))
    first, second = compensated(model, errors), flipped(model, errors, seed=2)
    first.__enter__()
    second.__enter__()
    got.append(model(x))
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert all(torch.equal(each, got[0]) for each in got)


@torch.no_grad()
def test_recalibrated_statistics_are_those_of_a_batch_under_the_same_flips():
    model, x = small_net().eval(), torch.randn(80, 12)
    with flipped(model, 0.2, seed=1), compensated(model, 0.2, "recalibration", data=[x[:30], x[30:60], x[60:]]):
        got = model(x)
    other = copy.deepcopy(model)
    for layer in (1, 4):
        other[layer].momentum = 1.0
    with flipped(other, 0.2, seed=1):
        other.train()(x)
        expected = other.eval()(x)
    one_batch = Method("recalibration", samples=80)
    with flipped(model, 0.2, seed=1), compensated(model, 0.2, one_batch, data=[x]):
        assert torch.allclose(model(x), expected, atol=1e-4)
    assert got.shape == expected.shape


@torch.no_grad()
def test_samples_end_the_data():
    """Batches after the one that fills the number are not read."""
    model, x, read = small_net().eval(), torch.randn(20, 12), []

    def data():
        for _ in range(10):
            read.append(1)
            yield x, torch.zeros(20)

    with compensated(model, 0.2, Method("recalibration", samples=50), data=data()):
        model(x)
    assert len(read) == 3


class Unknown(ErrorModel):
    def flips(self, weight, key):
        return torch.arange(0, weight.numel(), 3)


@pytest.mark.parametrize(
    ("error_model", "kind", "message"),
    [
        (Unknown(), "auto", r"rates of stored bits of Unknown\(\) in '0.weight' are not known"),
        (0.1, "recalibration", "recalibration needs data="),
        (0.1, Method(die="other"), "die='other' is for curves"),
        (0.5, "auto", "nothing is left of the sums with 0.weight"),
        (2, "auto", r"rate must be a fraction in \[0, 1\], got 2"),
        (0.1, "magic", "kind must be one of"),
    ],
)
def test_what_can_not_be_compensated_is_one_clear_error(error_model, kind, message):
    model = small_net().eval()
    with pytest.raises(ValueError, match=message), compensated(model, error_model, kind):
        model(torch.randn(2, 12))


def test_batch_norms_without_statistics_are_an_error_that_names_them():
    model = small_net()
    message = "thresholds of 0 can't be scaled: 1 has no running statistics or does not use them"
    with pytest.raises(ValueError, match=message), compensated(model.train(), 0.1, "thresholds"):
        model(torch.randn(4, 12))
    bare = nn.Sequential(BinaryLinear(8, 4), BinaryActivation(), BinaryLinear(4, 2)).eval()
    with (
        pytest.raises(ValueError, match="no batch norm"),
        compensated(bare, 0.1, "recalibration", data=[torch.ones(4, 8)]),
    ):
        bare(torch.randn(4, 8))


def test_statistics_of_another_size_are_an_error():
    model = small_net().eval()
    with compensated(model, 0.1, "recalibration", data=[torch.randn(8, 12)]):
        model(torch.randn(2, 12))
        model[1] = model[1].__class__(16)
        model[1].running_mean = torch.zeros(1)
        with pytest.raises((ValueError, RuntimeError)):
            model(torch.randn(2, 12))


def test_a_model_without_stored_bits_is_an_error():
    model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="no sum of Linear can be corrected"), compensated(model, 0.1):
        model(torch.ones(1, 4))


def test_auto_says_where_scaling_does_not_help_and_what_it_does():
    pooled = nn.Sequential(
        BinaryConv2d(1, 4, 3, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(4), BinaryActivation(),
        BinaryConv2d(4, 2, 2, bias=False), nn.BatchNorm2d(2), BinaryActivation(), nn.Flatten(),
        BinaryLinear(8, 2, bias=False),
    ).eval()  # fmt: skip
    x = torch.randn(4, 1, 8, 8)
    clean = pooled(x)
    said = "0: max-pooling takes the largest.*4: its kernels have 16 bits only.*that needs data"
    with pytest.warns(UserWarning, match=said), compensated(pooled, 0.1):
        assert torch.allclose(pooled(x), clean / 0.8)
    with pytest.warns(UserWarning, match="statistics are gathered anew"), compensated(pooled, 0.1, data=[x]):
        pooled(x)


def test_a_layer_whose_sums_can_not_be_corrected_is_left_out_and_said():
    torch.manual_seed(0)
    model = nn.Sequential(patterns.Centred(12, 16), nn.Tanh(), nn.Bilinear(16, 16, 3)).eval()
    with compensated(model, 0.1):
        model[:2](torch.randn(4, 12))


def test_rates_of_each_layer_are_its_own():
    model, x = small_net().eval(), torch.randn(5, 12)
    with torch.no_grad(), compensated(model, PerLayer({"6": 0.25})):
        got = model(x)
    assert torch.allclose(got, 2 * model(x))


def test_a_copy_or_a_pickle_inside_is_of_the_model_as_it_is():
    model, x = small_net().eval(), torch.randn(5, 12)
    clean = model(x)
    with compensated(model, 0.2):
        model(x)
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for each in copies:
        assert torch.equal(each(x), clean)


def test_gradients_pass():
    model, x = small_net().eval(), torch.randn(5, 12)
    with compensated(model, Asymmetric(0, 0.2)):
        model(x).square().mean().backward()
    assert all(layer.weight.grad is not None for layer in model if isinstance(layer, BinaryLinear))
