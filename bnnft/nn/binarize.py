"""The sign function with a straight-through estimator."""

from typing import Any

import torch
from torch import Tensor


class _StraightThroughSign(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, clip: float | None) -> Tensor:
        # copysign reads the sign bit alone, so that turning this bit turns the result for every float:
        # also for zeros, infinities and NaN. It is also a third of the cost of a comparison and a choice.
        return torch.copysign(torch.ones((), dtype=values.dtype, device=values.device), values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float | None], output: Tensor) -> None:
        values, ctx.clip = inputs
        if ctx.clip is not None:
            ctx.save_for_backward(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        if ctx.clip is None:
            return gradient, None
        (values,) = ctx.saved_tensors
        return gradient * (values.abs() <= ctx.clip), None


def binarize(values: Tensor, clip: float | None = None) -> Tensor:
    """Map every value to the +1 or -1 of its sign bit; in backward the gradient passes straight through.

    +0.0 becomes +1 and -0.0 becomes -1, so that the sign bit of a latent weight *is* its stored bit.

    Args:
        values: latent weights or pre-activations, any shape and float type.
        clip: with a number, the gradient is zero where ``|values| > clip`` (the clipped straight-through
            estimator, usual for activations); with ``None`` it passes everywhere.

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
    """
    result: Tensor = _StraightThroughSign.apply(values, clip)
    return result
