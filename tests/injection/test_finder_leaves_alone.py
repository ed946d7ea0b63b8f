"""What holds no bits is not found, and what is binary and has no single owner is named."""

import pytest
import torch
import torch.nn.functional as F
from binarized import Beside, Kernel, Two
from binarizers import WIDTH, ste
from structures import STRUCTURES
from torch import nn
from uses import run

from bnnft.injection.finder import Finder


def watched(model, *inputs, **options):
    """Return the finder of a model that has run once."""
    finder = Finder(model, **options)
    with finder:
        run(model, inputs)
    return finder


def names(finder):
    return [site.name for site in finder.findings.sites()]


def alone(function, shape=(WIDTH, WIDTH)):
    torch.manual_seed(0)
    return Kernel(shape, function)


FLOATS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "ones": lambda: nn.Linear(WIDTH, WIDTH).requires_grad_(False),
    "zeros": lambda: filled(nn.Linear(WIDTH, WIDTH), 0.0),
    "constant": lambda: filled(nn.Linear(WIDTH, WIDTH), 0.1),
    "normalized zeros": lambda: filled(nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), 0.0),
    "ternary": lambda: alone(lambda x, w: F.linear(x, (w * 0.8).round().clamp(-1, 1))),
    "four values": lambda: alone(lambda x, w: F.linear(x, (w * 2).floor().clamp(-2, 1) + 0.5)),
    "transformer": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True),
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "learned thresholds": lambda: alone(lambda x, w: ste(x - w), (WIDTH,)),
    "masks": lambda: alone(lambda x, w: F.linear(x, w * (w.abs() > 0.5))),
    "dropped": lambda: alone(lambda x, w: F.linear(x, F.dropout(w))),
    "signs of activations": lambda: alone(lambda x, w: F.linear(x, w).sign()),
    "signs of the size of a weight": lambda: alone(lambda x, w: ste(F.linear(x.t() @ x, w)) @ w),
    "scaled by its sign": lambda: alone(lambda x, w: F.linear(x, w.abs() * w.sign())),
    "rounded": lambda: alone(lambda x, w: F.linear(x, w.half().float())),
}


def filled(layer, value):
    for name, parameter in layer.named_parameters():
        if "bias" not in name:
            nn.init.constant_(parameter, value)
    return layer


@pytest.mark.parametrize("build", FLOATS.values(), ids=FLOATS)
def test_float_layers_hold_no_bits(build):
    """Beside a binarized layer, which is found alone."""
    torch.manual_seed(0)
    model = Beside(build())
    assert names(watched(model, torch.randn(6, WIDTH))) == ["a.weight"]


def test_a_float_embedding_is_a_float_use_of_the_parameter_and_its_head_a_binary_one():
    structure = STRUCTURES["tied embedding"]
    finder = watched(structure.model(), *structure.batch(6))
    assert finder.findings.floats == {"table.weight"}
    (site,) = finder.findings.sites()
    assert site.like_latent is False  # its latent can't be flipped: the lookups would be too


def matrices(names):
    return {name for name in names if not name.endswith("bias")}


def test_the_teacher_of_equal_signs_is_a_float():
    structure = STRUCTURES["teacher"]
    assert matrices(watched(structure.model(), *structure.batch(6)).findings.floats) == {"teacher.weight"}


@pytest.mark.parametrize("samples", [WIDTH, 8])
def test_noise_that_is_made_in_the_step_is_of_the_batch(samples):
    """Also where it has the shape of a weight: neurons that are made of it are no bits of the weight before them."""
    generator = alone(lambda x, w: F.linear(ste(F.linear(torch.randn(samples, WIDTH), w)), w))
    finder = watched(Beside(generator), torch.randn(6, WIDTH))
    assert names(finder) == ["a.weight"]
    assert matrices(finder.findings.floats) == {"other.w"}


def test_data_that_is_made_in_the_step_is_of_the_batch():
    model = Beside(alone(lambda x, w: F.linear(ste(F.linear(torch.tensor(x.tolist()), w)), w)))
    finder = watched(model, torch.randn(WIDTH, WIDTH))
    assert names(finder) == ["a.weight"]
    assert matrices(finder.findings.floats) == {"other.w"}


def test_a_constant_input_shows_binary_weights_too():
    model = alone(lambda x, w: F.linear(torch.ones(3, WIDTH), ste(w)) + x[:3])
    assert names(watched(model, torch.randn(6, WIDTH))) == ["w"]


STRANGERS = {
    "a buffer": lambda x, a, b, signs: F.linear(x, ste(a)) + F.linear(x, signs),
    "a constant": lambda x, a, b, signs: F.linear(F.linear(x, ste(a)), torch.eye(WIDTH) * 2 - 1),
    "a product of two parameters": lambda x, a, b, signs: F.linear(F.linear(x, ste(a)), ste(a @ b)),
}


class WithBuffer(Two):
    def __init__(self, function):
        super().__init__(function)
        self.register_buffer("signs", torch.randn(WIDTH, WIDTH).sign())

    def forward(self, x):
        return self.function(x, self.a, self.b, self.signs)


@pytest.mark.parametrize("function", STRANGERS.values(), ids=STRANGERS)
def test_what_is_binary_and_has_no_single_owner_is_named_with_its_module_and_shape(function):
    torch.manual_seed(0)
    finder = watched(nn.Sequential(WithBuffer(function)), torch.randn(6, WIDTH))
    assert names(finder) == ["0.a"]
    assert list(finder.findings.strangers) == [("0", (WIDTH, WIDTH))]


def test_masks_of_zeros_and_ones_are_not_named():
    def function(x, a, b, signs):
        return F.linear(F.linear(x, ste(a)), torch.ones(WIDTH, WIDTH).tril()) @ (signs > 0).float()

    torch.manual_seed(0)
    finder = watched(WithBuffer(function), torch.randn(6, WIDTH))
    assert names(finder) == ["a"]
    assert not finder.findings.strangers


def test_bits_that_an_earlier_forward_has_kept_are_named():
    class Caches(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(WIDTH, WIDTH))
            self.bits = None

        def forward(self, x):
            if self.bits is None:
                self.bits = self.w.detach().sign()
            return F.linear(x, self.bits)

    model = Caches()
    model(torch.randn(6, WIDTH))
    finder = watched(model, torch.randn(6, WIDTH))
    assert names(finder) == []
    assert list(finder.findings.strangers) == [("", (WIDTH, WIDTH))]
