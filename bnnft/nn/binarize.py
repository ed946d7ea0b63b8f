"""The sign function with a straight-through estimator."""

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Flips(NamedTuple):
    """Which of the bits that are made read wrong.

    Attributes:
        places: flat indices of them (int64, distinct), or a mask in the shape of the values (bool), which keeps its
            shape in a compiled graph.
        exact: let the gradient of a flipped bit change sign; else it passes as if nothing was flipped.
    """

    places: Tensor
    exact: bool = False

    @property
    def left_alone(self) -> bool:
        """It is lent for as long as a context lasts, also inside of what puts a model's attributes back."""
        return True

    def apply(self, values: Tensor) -> Tensor:
        """Return the values with the signs at the places changed; index lists change them in place."""
        if self.places.dtype == torch.bool:
            return torch.where(self.places, -values, values)
        memory = values.view(_INTEGERS[values.element_size()]).view(-1)
        # adding the sign bit changes this bit and no other: the carry falls off
        sign_bit = torch.tensor(torch.iinfo(memory.dtype).min, dtype=memory.dtype, device=memory.device)
        memory.index_add_(0, self.places, sign_bit.expand(self.places.shape))
        return values


class _Opposite(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, places: Tensor) -> Tensor:
        return Flips(places).apply(values.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return opposite(gradients[0], *ctx.saved_tensors), None


def opposite(values: Tensor, places: Tensor) -> Tensor:
    """Return values with other signs at some places, flat indices or a mask; so is the gradient, of any order."""
    if places.dtype == torch.bool:
        return torch.where(places, -values, values)
    result: Tensor = _Opposite.apply(values, places)
    return result


class _StraightThroughSign(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, clip: float | None, exact: tuple[bool, ...], *places: Tensor) -> Tensor:
        # copysign reads the sign bit alone, so that flipping this bit flips the result for every float:
        # also for zeros, infinities and NaN. It is also a third of the cost of a comparison and a choice.
        bits = torch.copysign(torch.ones((), dtype=values.dtype, device=values.device), values)
        if places and not bits.is_contiguous():
            bits = bits.contiguous()
        for place in places:
            bits = Flips(place).apply(bits)
        return bits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, ctx.clip, ctx.exact, *places = inputs
        ctx.save_for_backward(*([values] if ctx.clip is not None else []), *places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (gradient,), saved = gradients, list(ctx.saved_tensors)
        if ctx.clip is not None:
            gradient = gradient * (saved.pop(0).abs() <= ctx.clip)
        for exact, places in zip(ctx.exact, saved, strict=True):
            if exact:
                gradient = opposite(gradient, places)
        return gradient, None, None, *(None for _ in saved)


def binarize(values: Tensor, clip: float | None = None, flips: tuple[Flips, ...] = ()) -> Tensor:
    """Map every value to the +1 or -1 of its sign bit; in backward the gradient passes straight through.

    +0.0 becomes +1 and -0.0 becomes -1, so that the sign bit of a latent weight *is* its stored bit.

    Args:
        values: latent weights or pre-activations, any shape and float type.
        clip: with a number, the gradient is zero where ``|values| > clip`` (the clipped straight-through
            estimator, usual for activations); with ``None`` it passes everywhere.
        flips: of the bits, one after the other.

    Returns:
        A tensor of the same shape and type that holds -1 and +1 only.

    Source: Hubara et al. 2016, "Binarized Neural Networks", section 1.2 and equation 4.

    Example:
        >>> import torch
        >>> binarize(torch.tensor([-0.3, 0.0, -0.0, 2.0]))
        tensor([-1.,  1., -1.,  1.])
        >>> values = torch.tensor([-0.3, 2.0], requires_grad=True)
        >>> binarize(values, clip=1.0).sum().backward()
        >>> values.grad
        tensor([1., 0.])
        >>> binarize(torch.tensor([-0.3, 2.0]), flips=(Flips(torch.tensor([1])),))
        tensor([-1., -1.])
    """
    if (torch.compiler.is_compiling() or torch._C._get_tracing_state()) and torch.onnx.is_in_onnx_export():
        # ONNX has no operator that reads a sign bit. That of a zero is the sign of its reciprocal
        negative, ones = (values < 0) | (values.reciprocal() < 0), torch.ones_like(values)
        return reduce(lambda bits, each: each.apply(bits), flips, torch.where(negative, -ones, ones))
    result: Tensor = _StraightThroughSign.apply(
        values, clip, tuple(each.exact for each in flips), *(each.places for each in flips)
    )
    return result
