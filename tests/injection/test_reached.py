"""Flips that would reach no bit are an error with its reason, not a curve that looks too good."""

import pytest
import torch
from kernels import Kernel, kernel, signs
from torch.nn import functional as F

import bnnft
from bnnft.injection.finder import Finder
from bnnft.injection.reached import check_reached
from bnnft.injection.sites import known_sites

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


def test_a_parameter_of_several_bits_is_an_error():
    model, _ = kernel(lambda x, w, scale: F.linear(x, signs(w)))
    finder = Finder(model)
    finder.findings.several.add("w")
    (site,) = known_sites(model, ["w"])
    with pytest.raises(RuntimeError, match="w holds more than one bit for each element"):
        check_reached(finder, [site], "auto")
