"""Networks whose latent weights are flipped in tests, and the same flips made by multiplication, without a write."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from bnnft.injection.sites import Site
from bnnft.nn import BinaryActivation, BinaryLinear


class Recording(BinaryLinear):
    """Keeps the sign bits that it has computed with."""

    def __init__(self, *sizes):
        super().__init__(*sizes, bias=False)
        self.seen = []

    def forward(self, x):
        self.seen.append(self.weight.detach().signbit())
        return super().forward(x)


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        ctx.save_for_backward(weight)
        return torch.where(weight >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (ctx.saved_tensors[0].abs() <= 1)


class Saving(nn.Linear):
    """Autograd saves the latent weight itself, for the clipped straight-through gradient."""

    def __init__(self, *sizes):
        super().__init__(*sizes, bias=False)

    def forward(self, x):
        return F.linear(x, _Clipped.apply(self.weight))


class Stored(nn.Linear):
    """The parameter holds the bits themselves, so that autograd saves it for the gradient of the input."""

    def __init__(self, *sizes):
        super().__init__(*sizes, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight)


def network(*layers, seed=0):
    """Three binary layers, of the kinds that are given, and a float one."""
    torch.manual_seed(seed)
    first, second, third = layers * 3 if len(layers) == 1 else layers or (Recording,) * 3
    net = nn.Sequential(
        first(12, 16),
        nn.BatchNorm1d(16),
        nn.Hardtanh(),
        second(16, 16),
        BinaryActivation(),
        third(16, 8),
        nn.Linear(8, 3),
    )
    for layer in binary_layers(net):
        nn.init.uniform_(layer.weight, -0.5, 0.5)
    return net


def binary_layers(model):
    return [module for module in model.modules() if isinstance(module, (Recording, Saving, Stored, BinaryLinear))]


def sites(model):
    names = {id(layer.weight) for layer in binary_layers(model)}
    return [Site(n, w, i) for i, (n, w) in enumerate(model.named_parameters()) if id(w) in names]


def draw(model, seed=0, rate=0.3):
    """Flips of every site: sorted flat indices."""
    generator = torch.Generator().manual_seed(seed)
    return {
        site.name: (torch.rand(site.weight.numel(), generator=generator) < rate).nonzero().squeeze(1)
        for site in sites(model)
    }


def multiplied(model, flips, exact=False):
    """The parameters as they are now with flipped signs, as functions of them."""
    weights = {}
    for name, indices in flips.items():
        weight = model.get_parameter(name)
        signs = torch.ones(weight.numel())
        signs[indices] = -1
        signs = signs.view_as(weight)
        weights[name] = weight * signs if exact else weight + (weight.detach() * (signs - 1))
    return weights


def by_multiplication(model, flips, exact=False):
    """A function that runs the model under flips."""
    return lambda x: functional_call(model, multiplied(model, flips, exact), x)


def batches(count, size=8):
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(size, 12, generator=generator), torch.arange(size) % 3) for _ in range(count)]


def copied_state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal_states(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def bits(model):
    """The raw sign bits of every site, as they stand in memory now."""
    return {site.name: site.weight.detach().signbit() for site in sites(model)}


def differing(model, before):
    """For each site, the flat indices of the sign bits that differ from those before."""
    return {name: (now ^ before[name]).flatten().nonzero().squeeze(1) for name, now in bits(model).items()}


def same_flips(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
