"""Network structures in which weights are binarized, small, with every use of their bits.

They differ by how bits are made, by how often, in which part and in which order of its elements a parameter is used,
and by what else stands beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import binarizers
import patterns
import torch
import torch.nn.functional as F
from binarized import (
    Attention,
    Beside,
    BinaryEmbedding,
    Blur,
    Called,
    Convolution,
    Kept,
    Kernel,
    LikeWeights,
    Momentum,
    Product,
    Recurrent,
    Teacher,
    Tied,
    TiedEmbedding,
    Two,
    scripted,
)
from binarizers import WIDTH, ste
from torch import nn


def whole(values):
    return values


def transposed(values):
    return values.transpose(-1, -2)


def part(number, of, dim=0):
    """Return the layout of one of several equal parts."""
    return lambda values: values.chunk(of, dim)[number]


@dataclass
class Structure:
    """A network, and what it is to be found to compute with.

    Attributes:
        build: makes the network.
        uses: in their order, for each operand that is combined with the batch the parameter and how its elements lie in
            the operand; ``None`` for one that holds no bits.
        inputs: of so many samples.
        line: dimensions along which the two values of an operand are the same, if they are not -c and c.
        passes: the gradient passes the scales of the bits, as it passes the bits: not where scales are learned too.
    """

    build: Callable
    uses: list
    inputs: Callable = field(default=lambda n, generator: (torch.randn(n, WIDTH, generator=generator),))
    line: tuple | None = None
    passes: bool = True

    def model(self):
        """Return the network with the same weights each time, after its first forward."""
        torch.manual_seed(0)
        model = self.build()
        model(*self.batch(4))
        return model

    def batch(self, size, seed=1):
        return self.inputs(size, torch.Generator().manual_seed(seed))

    def owners(self):
        """Return the names of the parameters that hold bits, sorted."""
        names = [use[0] if isinstance(use[0], tuple) else (use[0],) for use in self.uses if use is not None]
        return sorted({name for each in names for name in each})


def of_one(function, *uses, shape=(WIDTH, WIDTH), **kwargs):
    """Return a structure of one parameter ``w`` whose uses have these layouts."""
    return Structure(lambda: Kernel(shape, function), [layout and ("w", layout) for layout in uses], **kwargs)


# --- which parts are used, and how often ---------------------------------------------------------------------------


def packed(x, w):
    q, k, v = (F.linear(x, each) for each in ste(w).chunk(3))
    return q * k + v


def experts(x, w):
    return sum(F.linear(x, ste(w[expert])) for expert in range(len(w)))


def experts_of_one(x, w):
    w = ste(w)
    return sum(F.linear(x, w[expert]) for expert in range(len(w)))


def all_experts(x, w):
    return torch.einsum("ni,eoi->neo", x, ste(w)).sum(1)


def recurrent(x, w):
    b, h = ste(w), torch.zeros_like(x)
    for _ in range(3):
        h = torch.tanh(x + F.linear(h, b))
    return h


def binarized_each_time(x, w):
    h = x
    for _ in range(3):
        h = torch.tanh(x + F.linear(h, ste(w)))
    return h


def two_views(x, w):
    return F.linear(x, ste(w.view(WIDTH, WIDTH))) + x @ ste(w.view(WIDTH, WIDTH))


def float_and_bits(x, w):
    return F.linear(F.linear(x, w), ste(w))


def products_and_sums(x, w):
    return (x[:, None] * ste(w)).sum(-1)


def permuted(x, w):
    return F.linear(x, ste(w.permute(2, 0, 1)).reshape(WIDTH, WIDTH))


def channels_last(x, w):
    return F.conv1d(x[:, :, None], ste(w.t()[:, :, None]))


def both_in_one(x, a, b):
    return F.linear(x, torch.cat([ste(a), ste(b)]))


def one_after_the_other(x, a, b):
    return F.linear(F.linear(x, ste(a)), ste(b))


IN_ATTENTION = "parametrizations.in_proj_weight", "out_proj.parametrizations.weight"


def images(n, generator):
    return (torch.randn(n, 4, 6, 6, generator=generator),)


def convolution(function, *shape):
    return Structure(lambda: Convolution(function, *shape), [("w", whole)], images)


MADE = {f.__name__: of_one(lambda x, w, f=f: F.linear(x, f(w)), whole) for f in binarizers.SYMMETRIC}
MADE |= {f.__name__: of_one(lambda x, w, f=f: F.linear(x, f(w)), whole, line=(0, 1)) for f in binarizers.ASYMMETRIC}

PARTS = {
    "packed": of_one(packed, *(part(n, 3) for n in range(3)), shape=(3 * WIDTH, WIDTH)),
    "experts": of_one(experts, *(lambda v, n=n: v[n] for n in range(4)), shape=(4, WIDTH, WIDTH)),
    "experts of one tensor": of_one(experts_of_one, *(lambda v, n=n: v[n] for n in range(4)), shape=(4, WIDTH, WIDTH)),
    "all experts": of_one(all_experts, whole, shape=(4, WIDTH, WIDTH)),
    "recurrent": of_one(recurrent, whole, whole),
    "binarized each time": of_one(binarized_each_time, whole, whole, whole),
    "two views": of_one(two_views, *(lambda v: v.view(WIDTH, WIDTH),) * 2, shape=(WIDTH * WIDTH, 1)),
    "float and bits": of_one(float_and_bits, None, whole),
    "products and sums": of_one(products_and_sums, whole),
    "permuted": of_one(permuted, lambda v: v.permute(2, 0, 1).reshape(WIDTH, WIDTH), shape=(4, 5, WIDTH)),
    "transposed and widened": of_one(channels_last, lambda v: v.t()[:, :, None]),
    "from the right": of_one(lambda x, w: x @ ste(w), whole),
    "transposed when used": of_one(lambda x, w: x.mm(ste(w).t()), transposed),
    "inside of a function": of_one(Product.apply, transposed, passes=False),
    "transposed before": of_one(lambda x, w: x.mm(ste(w.t())), transposed),
    "weight first": of_one(lambda x, w: (ste(w) @ x.t()).t(), whole),
    "bases apart": of_one(lambda x, w: F.linear(x, ste(w)) + F.linear(x, ste(w - 0.5)), whole, whole),
    "sliced": of_one(lambda x, w: F.linear(x[:, :7], ste(w[:, 3:10])), lambda v: v[:, 3:10]),
    "every other": of_one(lambda x, w: F.linear(x[:, ::2], ste(w)[:, ::2]), lambda v: v[:, ::2]),
    "repeated": of_one(lambda x, w: F.linear(torch.cat([x, x], 1), ste(w).repeat(1, 2)), lambda v: v.repeat(1, 2)),
    "two in one": Structure(lambda: Two(both_in_one), [(("a", "b"), lambda a, b: torch.cat([a, b]))]),
    "one after the other": Structure(lambda: Two(one_after_the_other), [("a", whole), ("b", whole)]),
}

NETWORKS = {
    "tied": Structure(Tied, [("first.weight", whole)] * 3),
    "attention": Structure(
        Attention,
        [
            (f"a.{name}.original", whole)
            for name in ("parametrizations.in_proj_weight", "out_proj.parametrizations.weight")
        ],
    ),
    "teacher": Structure(Teacher, [None, ("student.weight", whole)]),
    "momentum": Structure(Momentum, [None, ("online.weight", whole)]),
    "tied embedding": Structure(TiedEmbedding, [None, ("table.weight", whole)]),
    "binary embedding": Structure(BinaryEmbedding, [("table", whole)]),
    "activations like weights": Structure(LikeWeights, [None, None, ("o.weight", whole)]),
    "blur": Structure(Blur, [None, ("a.weight", whole)]),
    "functional call": Structure(Called, [("layer.weight", whole)]),
    "kept bits": Structure(Kept, [("w", whole)] * 2),
    "scripted beside": Structure(lambda: Beside(scripted(nn.Linear(WIDTH, WIDTH))), [("a.weight", whole)]),
}
NETWORKS |= {
    kind.__name__: Structure(
        lambda kind=kind: Recurrent(kind), [(f"r.parametrizations.weight_{n}_l0.original", whole) for n in ("ih", "hh")]
    )
    for kind in (nn.LSTM, nn.GRU, nn.RNN)
}

CONVOLUTIONS = {
    "convolution": convolution(F.conv2d, 8, 4, 3, 3),
    "depthwise": convolution(lambda x, w: F.conv2d(x, w, groups=4), 4, 1, 3, 3),
    "1x1": convolution(F.conv2d, 8, 4, 1, 1),
    "depthwise 1x1": convolution(lambda x, w: F.conv2d(x, w, groups=4), 8, 1, 1, 1),
    "grouped": convolution(lambda x, w: F.conv2d(x, w, groups=2), 8, 2, 3, 3),
    "transposed convolution": convolution(F.conv_transpose2d, 4, 8, 3, 3),
}

LAYERS = {
    kind.__name__: Structure(lambda kind=kind: kind(WIDTH, WIDTH), [("weight", whole)])
    for kind in [*patterns.EXACT, *patterns.INEXACT, patterns.Organized]
}
LAYERS |= {
    "Flat": Structure(lambda: patterns.Flat(WIDTH, WIDTH), [("weights", lambda v: v.view(WIDTH, WIDTH))]),
    "TwoValues": Structure(lambda: patterns.TwoValues(WIDTH, WIDTH), [("weight", whole)], line=(1,), passes=False),
    "Transposed": Structure(lambda: patterns.Transposed(WIDTH, WIDTH), [("kernel", whole)]),
}

STRUCTURES = MADE | PARTS | NETWORKS | CONVOLUTIONS | LAYERS
