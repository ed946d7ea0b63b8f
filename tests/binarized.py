"""Modules in which weights are binarized by hand, each with another structure around its bits."""

import warnings

import torch
import torch.nn.functional as F
from binarizers import WIDTH, ste
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint


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
