"""Layers whose weights are one bit each, and the activation and scale that go with them."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnft.nn.binarize import Flips, binarize
from bnnft.nn.products import conv2d, linear


class StoredBits(nn.Module):
    """Base of layers whose weight is made of stored bits.

    Attributes:
        flips: of the bits, which an injection lends for as long as it lasts; no part of a copy, a pickle or a state
            dict.
    """

    weight: Any
    flips: tuple[Flips, ...] = ()

    def bits(self) -> Tensor:
        """Return the weight as it is read from memory, -1 and +1."""
        return binarize(self.weight, None, self.flips)

    def _are_signs(self) -> bool:
        """Return whether the bits are -1 and +1: a subclass may make others."""
        return type(self).bits is StoredBits.bits

    def __getstate__(self) -> dict[str, Any]:
        state = vars(self).copy()
        state.pop("flips", None)
        return state


class BinaryLinear(StoredBits, nn.Linear):
    """``torch.nn.Linear`` that computes with the signs of its weight.

    All arguments are those of :class:`torch.nn.Linear`. ``weight`` is the latent weight; its sign bit is the
    stored bit. A bias, where asked for, stays a float.

    Shapes: input ``(*, in_features)``, output ``(*, out_features)``.

    Example:
        >>> import torch
        >>> layer = BinaryLinear(4, 2, bias=False)
        >>> set(layer(torch.ones(1, 4)).flatten().tolist()) <= {-4.0, -2.0, 0.0, 2.0, 4.0}  # sums of four signs
        True
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply the linear map with weights in {-1, +1}."""
        product = linear if self._are_signs() else F.linear
        return product(input, self.bits(), self.bias)


class BinaryConv2d(StoredBits, nn.Conv2d):
    """``torch.nn.Conv2d`` that computes with the signs of its weight.

    All arguments are those of :class:`torch.nn.Conv2d`. ``weight`` is the latent weight; its sign bit is the
    stored bit. A bias, where asked for, stays a float. Padding with zeros means fewer taps at the border.

    Shapes: input ``(N, C, H, W)`` or ``(C, H, W)``, output as of ``torch.nn.Conv2d``.

    Example:
        >>> import torch
        >>> BinaryConv2d(1, 2, kernel_size=3, padding=1)(torch.ones(5, 1, 8, 8)).shape
        torch.Size([5, 2, 8, 8])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply the convolution with weights in {-1, +1}."""
        return self._conv_forward(input, self.bits(), self.bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._are_signs():
            output: Tensor = super()._conv_forward(input, weight, bias)
            return output
        if self.padding_mode != "zeros":
            padded = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return conv2d(padded, weight, bias, self.stride, (0, 0), self.dilation, self.groups)
        return conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class BinaryActivation(nn.Module):
    """Sign of the pre-activation, with the clipped straight-through gradient.

    Args:
        clip: the gradient passes where ``|input| <= clip``; ``None`` lets it pass everywhere.

    Example:
        >>> import torch
        >>> BinaryActivation()(torch.tensor([-2.0, 0.5]))
        tensor([-1.,  1.])
    """

    def __init__(self, clip: float | None = 1.0) -> None:
        super().__init__()
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be positive or None, got {clip!r}")
        self.clip = clip

    def forward(self, input: Tensor) -> Tensor:
        """Return -1 and +1 in the shape of the input."""
        return binarize(input, self.clip)

    def extra_repr(self) -> str:
        """Show the clip in the module's representation."""
        return f"clip={self.clip}"


class Scale(nn.Module):
    """One learned positive factor on all class scores, so that integer scores suit a softmax.

    The factor is kept as its logarithm: whatever the optimizer does, it cannot pass through zero, where the
    best and the worst class would change places.

    Args:
        initial: the factor before training, greater than 0.

    Example:
        >>> import torch
        >>> Scale(0.5)(torch.tensor([4.0, -2.0])).tolist()
        [2.0, -1.0]
    """

    def __init__(self, initial: float = 1.0) -> None:
        super().__init__()
        if not (initial > 0 and math.isfinite(initial)):
            raise ValueError(f"initial must be a number greater than 0, got {initial!r}")
        self.log_scale = nn.Parameter(torch.tensor(math.log(initial)))

    def forward(self, input: Tensor) -> Tensor:
        """Multiply the input by the factor."""
        return input * self.log_scale.exp()
