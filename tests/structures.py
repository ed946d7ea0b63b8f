"""Network structures in which weights are binarized, small, with every use of their bits.

They differ by how bits are made, by how often, in which part and in which order of its elements a parameter is used,
and by what else stands beside it.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import binarizers
import patterns
import torch
import torch.nn.functional as F
from binarizers import WIDTH, ste
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint


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


class Linear(nn.Linear):
    """Binarized with a straight-through estimator by hand."""

    def __init__(self, inputs=WIDTH, outputs=WIDTH, bias=True):
        super().__init__(inputs, outputs, bias)

    def forward(self, x):
        return F.linear(x, ste(self.weight), self.bias)


class Kernel(nn.Module):
    """One parameter of some shape, and what a function makes of it and the batch."""

    def __init__(self, shape, function):
        super().__init__()
        self.w, self.function = nn.Parameter(torch.randn(*shape)), function

    def forward(self, x):
        return self.function(x, self.w)


def of_one(function, *uses, shape=(WIDTH, WIDTH), **kwargs):
    """Return a structure of one parameter ``w`` whose uses have these layouts."""
    return Structure(lambda: Kernel(shape, function), [layout and ("w", layout) for layout in uses], **kwargs)


class Product(torch.autograd.Function):
    """Binarizes, multiplies, and keeps its bits for the backward."""

    @staticmethod
    def forward(ctx, x, w):
        b = torch.where(w >= 0, 1.0, -1.0)
        ctx.save_for_backward(x, b)
        return x.mm(b.t())

    @staticmethod
    def backward(ctx, gradient):
        x, b = ctx.saved_tensors
        return gradient.mm(b), gradient.t().mm(x)


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


class Two(nn.Module):
    """Two parameters and a function of them."""

    def __init__(self, function, shape=(WIDTH, WIDTH)):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(*shape)), nn.Parameter(torch.randn(*shape))
        self.function = function

    def forward(self, x):
        return self.function(x, self.a, self.b)


class Tied(nn.Module):
    """One layer under two names, and called by its forward, without hooks."""

    def __init__(self):
        super().__init__()
        self.first = Linear()
        self.second = self.first

    def forward(self, x):
        return self.first.forward(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Binarized(nn.Module):
    def forward(self, w):
        return ste(w)


def parametrized(layer, *names):
    for name in names:
        parametrize.register_parametrization(layer, name, Binarized())
    return layer


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = parametrized(nn.MultiheadAttention(WIDTH, 2, batch_first=True), "in_proj_weight")
        parametrized(self.a.out_proj, "weight")

    def forward(self, x):
        return self.a(x[:, None], x[:, None], x[:, None])[0][:, 0]


IN_ATTENTION = "parametrizations.in_proj_weight", "out_proj.parametrizations.weight"


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.r = parametrized(kind(WIDTH, WIDTH, batch_first=True), "weight_ih_l0", "weight_hh_l0")

    def forward(self, x):
        return self.r(torch.stack([x, x + 1], 1))[0][:, -1]


class Teacher(nn.Module):
    """A float teacher, and a binary student that starts from its weights."""

    def __init__(self):
        super().__init__()
        self.teacher, self.student = nn.Linear(WIDTH, WIDTH).requires_grad_(False), Linear()
        self.student.load_state_dict(self.teacher.state_dict())

    def forward(self, x):
        return self.teacher(x) - self.student(x)


class Momentum(nn.Module):
    """A float copy of the weights that is registered first and follows them, as of mean teachers."""

    def __init__(self):
        super().__init__()
        self.copy, self.online = nn.Linear(WIDTH, WIDTH).requires_grad_(False), Linear()
        self.copy.load_state_dict(self.online.state_dict())

    def forward(self, x):
        for kept, now in zip(self.copy.parameters(), self.online.parameters(), strict=True):
            kept.data.mul_(0.9).add_(now.detach(), alpha=0.1)
        return self.online(x) - self.copy(x)


class TiedEmbedding(nn.Module):
    """A float embedding whose table is a binary head too."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(WIDTH, WIDTH)

    def forward(self, x):
        return F.linear(self.table(x.argmax(1)) + x, ste(self.table.weight))


class BinaryEmbedding(nn.Module):
    """Lookups of a binary table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        return F.embedding(x.argmax(1), ste(self.table)) * x


class LikeWeights(nn.Module):
    """Binary activations of the size of a weight, on both sides of a product."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), Linear()

    def forward(self, x):
        q, k = ste(self.q(x)), ste(self.k(x))
        return self.o((q @ k.t()) @ x)


class Blur(nn.Module):
    def __init__(self):
        super().__init__()
        self.blur, self.a = nn.Conv1d(1, 1, 3, bias=False, padding=1), Linear()
        nn.init.constant_(self.blur.weight, 1 / 3)

    def forward(self, x):
        return self.a(self.blur(x[:, None])[:, 0])


class Beside(nn.Module):
    """A binarized layer beside something else."""

    def __init__(self, other, layer=None):
        super().__init__()
        self.other, self.a = other, Linear() if layer is None else layer

    def forward(self, x):
        return self.a(torch.tanh(self.other(x)))


def scripted(module):
    with warnings.catch_warnings(action="ignore"):  # it is deprecated, and still there
        return torch.jit.script(module)


def constant_float(sign):
    layer = nn.Linear(WIDTH, WIDTH)
    nn.init.constant_(layer.weight, sign * 0.1)
    return layer


class Repeated(nn.Module):
    """Activation checkpointing of a function that uses the module's own parameter."""

    def __init__(self, reentrant):
        super().__init__()
        self.f, self.w, self.reentrant = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH, WIDTH)), reentrant

    def product(self, x):
        return torch.tanh(F.linear(x, ste(self.w)))

    def forward(self, x):
        return checkpoint(self.product, self.f(x), use_reentrant=self.reentrant)


class Called(nn.Module):
    """A layer that runs with tensors in the place of its parameters."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        weights = {"weight": ste(self.layer.weight), "bias": self.layer.bias}
        return torch.func.functional_call(self.layer, weights, (x,))


class Kept(nn.Module):
    """Bits that the layer keeps as an attribute."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        self.bits = ste(self.w)
        return F.linear(F.linear(x, self.bits), self.bits)


class Convolution(nn.Module):
    def __init__(self, function, *shape):
        super().__init__()
        self.w, self.function = nn.Parameter(torch.randn(*shape)), function

    def forward(self, x):
        return self.function(x, ste(self.w)).flatten(1)


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
