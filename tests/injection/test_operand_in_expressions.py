"""Flips in bits that are made and combined with the batch in any way that torch offers.

What a layer computes depends on the signs of its latent alone, so that flips are the same as latents of the other sign.
"""

import pytest
import torch
import torch.nn.functional as F
from binarized import Kernel
from binarizers import WIDTH
from uses import mask_of, run, some_flips

from bnnft.ber import Independent, Key
from bnnft.injection.finder import Finder
from bnnft.injection.flipped import Injection


def signs(w):
    return torch.where(w >= 0, 1.0, -1.0)


def by_set_ones(x, w):
    b = x.new_ones(w.shape)
    b[w < 0] = -1
    return F.linear(x, b)


def by_places(x, w):
    b = -torch.ones_like(w).view(-1)
    return F.linear(x, b.index_fill(0, (w.view(-1) > 0).nonzero().squeeze(1), 1.0).view_as(w))


def by_one_hot(x, w):
    return F.linear(x, F.one_hot((w > 0).long(), 2).float() @ torch.tensor([-1.0, 1.0]))


def into_given(x, w):
    output = x.new_empty(len(x), WIDTH)
    torch.mm(x, signs(w).t(), out=output)
    return output


def with_constants(x, w):
    return F.linear(x, torch.cat([signs(w), torch.ones(1, WIDTH)]))


def of_some(x, w):
    return F.linear(x, torch.kron(signs(w[:4, :5]), torch.ones(5, 4)))


MADE = {
    "set in ones": by_set_ones,
    "filled by places": by_places,
    "one-hot": by_one_hot,
    "looked up": lambda x, w: F.linear(x, torch.tensor([-1.0, 1.0])[(w > 0).long()]),
    "rounded": lambda x, w: F.linear(x, 2 * torch.round(torch.sigmoid(w)) - 1),
    "by the largest": lambda x, w: F.linear(x, (torch.stack([w, -w], -1).argmax(-1) == 0).float() * 2 - 1),
    "of two constants": lambda x, w: F.linear(x, torch.where(w > 0, torch.tensor(1.0), torch.tensor(-1.0))),
    "of bounded ones": lambda x, w: F.linear(x, torch.sign(torch.tanh(w * 5))),
    "of normalized ones": lambda x, w: F.linear(x, signs(F.normalize(w, dim=1))),
    "of transformed ones": lambda x, w: F.linear(x, signs(torch.fft.ifft(torch.fft.fft(w)).real)),
    "in half precision": lambda x, w: F.linear(x.half(), signs(w).half()).float(),
    "mask in another order": lambda x, w: F.linear(x, (w > 0).t().float() * 2 - 1),
    "times a constant": lambda x, w: F.linear(x, signs(w) * torch.tensor(2.0)),
    "times constants": lambda x, w: F.linear(x, signs(w) * torch.tensor([1.0 + n for n in range(WIDTH)])[:, None]),
    "times mean magnitudes": lambda x, w: F.linear(x, w.sign().mul(w.norm(1, 1, keepdim=True).div(WIDTH).expand_as(w))),
    "with constants": with_constants,
    "of some": of_some,
}

USED = {
    "row by row": lambda x, w: torch.cat([x @ signs(w[i])[:, None] for i in range(WIDTH)], 1),
    "part by part": lambda x, w: torch.cat([F.linear(x, signs(w[i : i + 5])) for i in range(0, WIDTH, 5)], 1),
    "vector by vector": lambda x, w: torch.stack([signs(w).mv(each) for each in x]),
    "einsum": lambda x, w: torch.einsum("oi,ni->no", signs(w), x),
    "tensordot": lambda x, w: torch.tensordot(x, signs(w), dims=([1], [1])),
    "inner": lambda x, w: torch.inner(x, signs(w)),
    "baddbmm": lambda x, w: torch.baddbmm(torch.zeros(1, 1, 1), x[None], signs(w).t()[None])[0],
    "addmm": lambda x, w: torch.addmm(torch.zeros(WIDTH), x, signs(w).t()),
    "products and sums": lambda x, w: (x[:, :, None] * signs(w).t()[None]).sum(1),
    "products in place": lambda x, w: x[:, None].repeat(1, WIDTH, 1).mul_(signs(w)).sum(-1),
    "addcmul": lambda x, w: torch.addcmul(torch.zeros(1), x[:, None], signs(w)).sum(-1),
    "by names": lambda x, w: F.linear(input=x, weight=signs(w), bias=None),
    "twice": lambda x, w: (lambda b: F.linear(x, b) + F.linear(x, b.t()))(signs(w)),
    "into a given tensor": into_given,
    "distances": lambda x, w: torch.cdist(x, signs(w)),
    "angles": lambda x, w: F.cosine_similarity(x[:, None], signs(w)[None], -1),
    "differences": lambda x, w: (x[:, None] - signs(w)).abs().sum(-1),
    "scaled after": lambda x, w: F.linear(x, signs(w)) * w.abs().mean(1),
    "bilinear": lambda x, w: F.bilinear(x, x, signs(w)[None].expand(3, -1, -1)),
}


def kernel(function):
    torch.manual_seed(0)
    return Kernel((WIDTH, WIDTH), function), torch.randn(6, WIDTH)


def flipped_output(model, x, flips):
    injection = Injection(model)
    with injection.finder:
        run(model, (x,))
    injection.learn()
    injection.finder.bits.settle()
    with injection.under(flips, Independent(0.3), Key(0)):
        return run(model, (x,))


@pytest.mark.parametrize("function", (MADE | USED).values(), ids=MADE | USED)
def test_flips_are_latents_of_the_other_sign(function):
    model, x = kernel(function)
    flips = some_flips(model, ["w"])
    mask, clean = mask_of(model, "w", flips), model(x)
    expected = function(x, torch.where(mask, -model.w, model.w))
    assert not torch.allclose(expected, clean)
    assert torch.allclose(flipped_output(model, x, flips), expected, atol=1e-3)


BASES = torch.tensor([-0.5, 0.5])


def summed(x, w, bits):
    return F.linear(x, sum(scale * bits(w + shift) for scale, shift in zip((0.5, 0.3), BASES, strict=True)))


def stacked(x, w, bits):
    b = bits(w[None] + torch.tensor([-0.5, 0.5])[:, None, None])
    return F.linear(x, (b * torch.tensor([0.5, 0.3])[:, None, None]).sum(0))


def side_by_side(x, w, bits):
    return torch.einsum("ni,boi->nbo", x, bits(w[None] + torch.tensor([-0.5, 0.5])[:, None, None])).sum(1)


@pytest.mark.parametrize("function", [summed, stacked, side_by_side])
def test_several_bases_of_a_weight_are_flipped_at_the_same_places(function):
    """Each element of the parameter has a bit in each base, as of ABC-Net; its flips are in all of them."""
    model, x = kernel(lambda x, w: function(x, w, signs))
    flips = some_flips(model, ["w"])
    mask = mask_of(model, "w", flips)
    expected = function(x, model.w, lambda w: torch.where(mask, -signs(w), signs(w)))
    assert torch.allclose(flipped_output(model, x, flips), expected, atol=1e-4)


def residual(x, w):
    b = w.abs().mean(1, keepdim=True) * signs(w)
    rest = w - b
    return F.linear(x, b + rest.abs().mean(1, keepdim=True) * signs(rest))


NAMED = {
    "bits of what other bits have left": residual,
    "masks": lambda x, w: torch.where(w > 0, x[:, None], -x[:, None]).sum(-1),
    "small integers": lambda x, w: (x.sign().to(torch.int8)[:, None] * w.sign().to(torch.int8)).sum(-1).float(),
}


@pytest.mark.parametrize("function", NAMED.values(), ids=NAMED)
def test_bits_that_can_not_be_flipped_are_named(function):
    model, x = kernel(function)
    finder = Finder(model)
    with finder:
        model(x)
    assert not finder.findings.sites()
    assert list(finder.findings.strangers) == [("", (WIDTH, WIDTH))]
