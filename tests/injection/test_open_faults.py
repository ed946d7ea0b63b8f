"""Faults that are open: each test states a law that does not hold yet, and turns red once it does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import bnnft
from bnnft.injection.training import BitFlips


def signs(w):
    """Return the bits of a latent weight, with the gradient of the identity."""
    return w + (torch.where(w >= 0, 1.0, -1.0) - w).detach()


class Kernel(nn.Module):
    """A layer ``function(x, w, scale)``."""

    def __init__(self, function, width=32):
        super().__init__()
        self.w, self.scale = nn.Parameter(torch.randn(width, width)), nn.Parameter(torch.ones(width, 1))
        self.function = function

    def forward(self, x):
        return self.function(x, self.w, self.scale)


def kernel(function):
    torch.manual_seed(0)
    return Kernel(function), torch.randn(8, 32)


def test_the_clean_score_does_not_depend_on_the_number_of_batches():
    model, _ = kernel(lambda x, w, scale: F.linear(x, signs(w)))
    x = torch.randn(200, 32)
    targets = model(x).argmax(1)
    curve = bnnft.accuracy_over_ber(model, zip(x.split(50), targets.split(50), strict=True), [0, 0.3], maps=2)
    assert curve.clean == curve.mean[0] == 1


USES = {
    "masked": lambda x, w, scale: F.linear(x, signs(w).tril()),
    "bases summed": lambda x, w, scale: F.linear(x, 0.6 * signs(w - 0.5) + 0.4 * signs(w + 0.5)),
    "padded": lambda x, w, scale: F.linear(F.pad(x, (1, 1)), F.pad(signs(w), (1, 1))),
}


@pytest.mark.parametrize("function", USES.values(), ids=USES)
def test_the_first_forward_has_the_flips_of_the_second(function):
    model, x = kernel(function)
    with bnnft.flipped(model, 0.2, weights=["w"] if function is USES["bases summed"] else None):
        first, second = model(x), model(x)
    assert torch.allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("gradient", ["straight_through", "exact"])
def test_the_first_backward_has_the_gradients_of_the_second(gradient):
    model, x = kernel(lambda x, w, scale: F.linear(x, signs(w) * scale))
    with bnnft.flipped(model, 0.2, gradient=gradient):
        first, second = (torch.autograd.grad(model(x).square().sum(), list(model.parameters())) for _ in range(2))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-2) for a, b in zip(first, second, strict=True))


def test_exact_gradients_of_a_scale_are_those_of_the_flipped_bits():
    model, x = kernel(lambda x, w, scale: F.linear(x, signs(w) * scale))
    with bnnft.flipped(model, 0.2, gradient="exact", weights=["w"]) as flips:
        model(x).sum().backward()
    bits = signs(model.w).detach().view(-1).clone()
    bits[flips["w"]] *= -1
    expected = (bits.view(32, 32) * x.sum(0)).sum(1, keepdim=True)
    assert torch.allclose(model.scale.grad, expected, atol=1e-3)


def test_a_named_weight_that_holds_its_bits_itself_is_flipped():
    model, x = kernel(lambda x, w, scale: F.linear(x, w))
    model.w.data.sign_()
    clean = model(x)
    with bnnft.flipped(model, 0.2, weights=["w"]):
        assert not torch.equal(model(x), clean)


UNREACHED = {
    "in a mask": lambda x, w, scale: x.sum(1, keepdim=True) - 2 * (x[:, None] * (w < 0)).sum(-1),
    "a float weight": lambda x, w, scale: F.linear(x, w),
    "by way of numbers": lambda x, w, scale: F.linear(x, torch.from_numpy(w.detach().sign().numpy())),
}


@pytest.mark.parametrize("function", UNREACHED.values(), ids=UNREACHED)
def test_flips_that_reach_no_use_are_an_error(function):
    model, x = kernel(function)
    with pytest.raises(RuntimeError, match="w"), bnnft.flipped(model, 0.2, weights=["w"]):
        model(x)


def test_latent_signs_of_a_float_weight_are_refused():
    model, x = kernel(lambda x, w, scale: F.linear(x, w))
    with pytest.raises(RuntimeError, match="latent"), bnnft.flipped(model, 0.2, weights=["w"], how="latent"):
        model(x)


class Cached(Kernel):
    """Keeps its bits in evaluation."""

    bits = None

    def forward(self, x):
        if self.bits is None:
            self.bits = signs(self.w).detach()
        return F.linear(x, self.bits)


def test_a_curve_of_cached_bits_is_an_error_or_right():
    torch.manual_seed(0)
    model, x = Cached(None).eval(), torch.randn(100, 32)
    targets = F.linear(x, model.w.sign()).argmax(1)
    try:
        curve = bnnft.accuracy_over_ber(model, [(x, targets)], [0, 0.5], maps=2)
    except (RuntimeError, ValueError):
        return
    assert curve.mean[1] < 0.5


def test_pruning_while_training_goes_on():
    model, x = kernel(lambda x, w, scale: F.linear(x, signs(w)))
    model.scale = None  # one parameter, so that only its name changes
    training = BitFlips(model, 0.1)
    for batch in range(4):
        if batch == 2:
            prune.l1_unstructured(model, "w", 0.5)
        with training.batch():
            model(x).square().mean().backward()
