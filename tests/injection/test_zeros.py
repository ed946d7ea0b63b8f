"""Latents of exactly 0: what a later operation makes of the zeros of a sign are bits, and flip."""

import pytest
import torch
from operands import Operands

from bnnft.ber import Independent, Key
from bnnft.injection.injection import Injection

both_gradients = pytest.mark.parametrize("exact", [False, True], ids=["straight-through", "exact"])


def filled_in_place(weight):
    bits = weight.detach().sign()
    bits[bits == 0] = 1
    return bits + (weight - weight.detach())


FILLS = {
    "where": lambda w: torch.where(w.sign() == 0, 1.0, w.sign()),
    "to -1": lambda w: torch.where(w.sign() == 0, -1.0, w.sign()),
    "masked_fill": lambda w: w.sign().masked_fill(w == 0, 1.0),
    "in place": filled_in_place,
    "twice signed": lambda w: w.sign().add(0.5).sign(),
    "scaled before": lambda w: torch.where((0.3 * w.sign()) == 0, 0.3, 0.3 * w.sign()),
    "scaled after": lambda w: w.sign().masked_fill(w == 0, 1.0) * w.abs().mean(1, keepdim=True),
    "none": torch.sign,
}


class Filled(torch.nn.Linear):
    fill = None

    def forward(self, inputs):
        return torch.nn.functional.linear(inputs, self.fill(self.weight))


@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
@pytest.mark.parametrize("zeros", ["one", "some", "half"])
@both_gradients
def test_what_fills_the_zeros_of_a_sign_makes_bits_that_flip(fill, zeros, exact):
    """Latents of exactly 0, of both signs: their bits are those that a later operation makes; unfilled they stay 0."""
    layer, inputs = Filled(40, 16, bias=False), torch.randn(5, 40)
    layer.fill = fill
    with torch.no_grad():
        if zeros == "half":
            layer.weight[:, ::2], layer.weight[:, ::4] = 0.0, -0.0
        else:
            layer.weight.view(-1)[torch.arange(0, 640, 640 if zeros == "one" else 91)] = 0.0
    injection = Injection(layer, exact=exact)
    with injection.finder:
        layer(inputs)
    injection.learn()
    if fill is torch.sign and zeros == "some":
        assert not injection.sites, "three values are no bits"
        return
    flips = {"weight": torch.arange(0, 640, 3)}
    clean = fill(layer.weight)
    signs = torch.ones(640).index_fill(0, flips["weight"], -1).view(16, 40)
    with Operands() as operands, injection.under(flips, Independent(0.3), Key(0)):
        (gradient,) = torch.autograd.grad(layer(inputs).sum(), layer.weight)
    assert torch.equal(operands.seen[-1], clean.detach() * signs)
    if fill is filled_in_place:
        expected = inputs.sum(0).expand(16, 40)
        assert torch.allclose(gradient, expected * signs if exact else expected, atol=1e-5)
