"""The gradient of flipped bits changes sign in every use, or there is an error."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bnnft.injection.training import BitFlips


class Signed(nn.Linear):
    """A sign with the straight-through estimator, in one or two uses, kept in the graph or hidden from it."""

    how = "plain"

    def forward(self, x):
        if self.how == "checkpointed":
            return checkpoint(self.compute, x, use_reentrant=False)
        return self.compute(x)

    def compute(self, x):
        bits = self.weight + (self.weight.sign() - self.weight).detach()
        if self.how == "hidden":
            bits = bits.detach()
        result = F.linear(x, bits)
        return result + F.linear(x.square(), bits) if self.how == "used twice" else result


def gradient_of(layer, xs, kind):
    """Return the gradient in the last of some batches."""
    training = BitFlips(layer, 0.3, gradient=kind, weights=["weight"])
    for x in xs:
        layer.weight.grad = None
        with training.batch():
            layer(x).sum().backward()
    return layer.weight.grad.clone()


@pytest.mark.parametrize("how", ["plain", "used twice", "checkpointed"])
def test_it_is_the_straight_through_one_but_for_the_signs_of_flipped_bits(how):
    xs, gradients = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(1)), {}
    for kind in ("straight_through", "exact"):
        torch.manual_seed(0)
        layer = Signed(12, 6, bias=False)
        layer.how = how
        gradients[kind] = gradient_of(layer, xs, kind)
    ratio = gradients["exact"] / gradients["straight_through"]
    assert torch.allclose(ratio.abs(), torch.ones(6, 12))
    assert 8 <= int((ratio < 0).sum()) <= 38, "of 72 bits at 0.3; outside with 1e-4"


@pytest.mark.parametrize("kind", ["exact", "straight_through"])
def test_bits_that_autograd_does_not_see_are_an_error_that_names_their_weight(kind):
    layer = Signed(12, 6, bias=True)
    layer.how = "hidden"

    def train():
        training = BitFlips(layer, 0.3, gradient=kind, weights=["weight"])
        for x in torch.randn(2, 4, 12):
            with training.batch():
                (layer(x) + layer.bias).sum().backward()

    if kind == "straight_through":
        train()
        return
    with pytest.raises(RuntimeError, match="gradient='exact' can't reach the bits of weight, which the model hides"):
        train()
    assert not layer.weight._backward_hooks


def test_it_stays_exact_when_the_model_has_other_parameters_than_before():
    """A new parameter lets the run look for bits afresh."""
    layer, ratios = Signed(12, 6, bias=False), []
    xs = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(1))
    trainings = {kind: BitFlips(layer, 0.3, gradient=kind) for kind in ("straight_through", "exact")}
    for number, x in enumerate(xs):
        if number == 1:
            layer.weight = nn.Parameter(layer.weight.detach().clone())
        gradients = {}
        for kind, training in trainings.items():
            layer.weight.grad = None
            with training.batch():
                layer(x).sum().backward()
            gradients[kind] = layer.weight.grad.clone()
        ratios.append(gradients["exact"] / gradients["straight_through"])
    assert 8 <= int((ratios[-1] < 0).sum()) <= 38, "of 72 bits at 0.3; outside with 1e-4"
