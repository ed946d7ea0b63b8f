"""Binarized linear layers as people write them by hand, each small, with what is to be expected of it."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.where(x >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class _Layer(nn.Module):
    """A latent weight of any sign, away from zero or not."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / math.sqrt(inputs))


class SignFunction(_Layer):
    """Sign with a gradient that passes, as BinaryNet today."""

    def forward(self, x):
        return F.linear(x, _Sign.apply(self.weight))


class Organized(_Layer):
    """The latent is an attribute of the parameter, which every forward overwrites, as BinaryNet of old."""

    def forward(self, x):
        if not hasattr(self.weight, "org"):
            self.weight.org = self.weight.data.clone()
        self.weight.data = self.weight.org.sign()
        return F.linear(x, self.weight)


class Flat(nn.Module):
    """A flat parameter viewed as a kernel, times its mean magnitude, as Bi-Real-net."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.shape = (outputs, inputs)
        self.weights = nn.Parameter(torch.randn(outputs * inputs, 1) * 0.1)

    def forward(self, x):
        real = self.weights.view(self.shape)
        scale = real.abs().mean(1, keepdim=True).detach()
        clipped = real.clamp(-1, 1)
        return F.linear(x, (scale * real.sign()).detach() - clipped.detach() + clipped)


class Centred(_Layer):
    """The mean of each row is subtracted before the sign, as IR-Net and ReCU."""

    def forward(self, x):
        centred = self.weight - self.weight.mean(1, keepdim=True)
        return F.linear(x, _Sign.apply(centred / centred.std(1, keepdim=True)))


class Rotated(Centred):
    """A rotation in between, as RBNN."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.register_buffer("rotation", torch.linalg.qr(torch.randn(inputs, inputs))[0])

    def forward(self, x):
        return F.linear(x, _Sign.apply((self.weight - self.weight.mean(1, keepdim=True)) @ self.rotation))


class Scaled(_Layer):
    """The mean of the whole tensor is subtracted, and the scale is its mean magnitude, as BitNet."""

    def forward(self, x):
        binary = (self.weight - self.weight.mean()).sign() * self.weight.abs().mean()
        return F.linear(x, self.weight + (binary - self.weight).detach())


class TwoValues(_Layer):
    """Mean plus or minus deviation of each row, not symmetric about zero, as AdaBin."""

    def forward(self, x):
        mean, std = self.weight.mean(1, keepdim=True) + 0.02, self.weight.std(1, keepdim=True)
        return F.linear(x, _Sign.apply(self.weight - mean) * std + mean)


class ClampedInPlace(_Layer):
    """The latent is clamped in place in every forward, then binarized in a function of its own, as BinaryConnect."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.2, 0.2)
        return F.linear(x, _Sign.apply(self.weight))


class Stochastic(_Layer):
    """A bit is drawn anew in each forward, +1 with probability sigmoid(w), as BinaryConnect's other mode."""

    def forward(self, x):
        drawn = torch.where(torch.rand_like(self.weight) < torch.sigmoid(self.weight), 1.0, -1.0)
        return F.linear(x, self.weight + (drawn - self.weight).detach())


class CopiedGradient(_Layer):
    """Binarized without a graph; a hook copies the gradient over, as BinaryConnect's deterministic mode."""

    def forward(self, x):
        with torch.no_grad():
            binary = torch.where(self.weight >= 0, 1.0, -1.0)
        if torch.is_grad_enabled():
            binary.requires_grad_().register_hook(self._copy)
        return F.linear(x, binary)

    def _copy(self, gradient):
        self.weight.grad = gradient.clone()


class Stored(_Layer):
    """The parameter itself holds -1 and +1, as Bop."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.weight.data.sign_()

    def forward(self, x):
        return F.linear(x, self.weight)


class TorchSign(_Layer):
    """torch.sign on weight and bias, with a gradient by subtracting and adding."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        weight, bias = (p + (p.sign() - p).detach() for p in (self.weight, self.bias))
        return F.linear(x, weight, bias)


class Transposed(nn.Module):
    """A kernel of shape (inputs, outputs), multiplied from the right."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return x @ _Sign.apply(self.kernel)


EXACT = [SignFunction, Flat, ClampedInPlace, CopiedGradient, Stored, TorchSign, Transposed]
INEXACT = [Centred, Rotated, Scaled, TwoValues, Stochastic]
