"""Products of bits with what layers are given, in int8 with int32 sums: faster, and equal in every bit.

As long as no sum leaves 2**24, float32 rounds nothing either, so that the result is the same to the last bit, on every
device and for every number of threads. An input qualifies where it holds integers of int8 times one power of two, as
binary activations and pixels on a dyadic grid do; each batch is looked at. Everything else is computed in float, as
``torch.nn`` does it, and so is the backward always.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnnft.nn.integers import applicable, exact_or_plain, on_grid

Size = Sequence[int]


def linear(input: Tensor, bits: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``torch.nn.functional.linear``, in integers where these are exact and gain time.

    Args:
        input: ``(*, in_features)``.
        bits: of -1 and +1, ``(out_features, in_features)``.
        bias: ``(out_features,)``. With one that does not lie on the input's grid the product is one in float.

    Example:
        >>> import torch
        >>> x, bits = torch.ones(256, 1024), torch.ones(512, 1024)
        >>> bool((linear(x, bits) == 1024).all())
        True
    """

    def plain() -> Tensor:
        return F.linear(input, bits, bias)

    if input.dim() < 2 or not applicable(input, bits) or input.shape[-1] != bits.shape[-1]:
        return plain()
    if not (input.is_contiguous() and bits.is_contiguous()):
        return plain()
    rows = input.view(-1, bits.shape[1])
    if input.is_cuda and (len(rows) <= 16 or rows.shape[1] % 8 or len(bits) % 8):
        return plain()  # shapes that torch._int_mm refuses
    found = on_grid(rows, bias)
    if found is None:
        return plain()

    def product() -> Tensor:
        sums = torch._int_mm(found[0], bits.to(torch.int8).t())
        return _finished(sums.to(input.dtype), found[1], bias)

    def exact() -> Tensor:
        output: Tensor = _Exact.apply(rows, bits, bias, product, _linear_backward)
        return output.view(*input.shape[:-1], -1)

    return exact_or_plain(f"torch._int_mm on {input.device.type}", exact, plain)


def conv2d(
    input: Tensor,
    bits: Tensor,
    bias: Tensor | None = None,
    stride: Size = (1, 1),
    padding: Size | str = (0, 0),
    dilation: Size = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Return ``torch.nn.functional.conv2d``, in integers where these are exact and gain time.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``.
        bits: of -1 and +1, ``(out_channels, C / groups, height, width)``.
        bias: ``(out_channels,)``, as of :func:`linear`.
        stride: steps of the kernel.
        padding: zeros at both ends, ``"same"`` or ``"valid"``.
        dilation: distance of the kernel's taps.
        groups: parts of the channels that do not meet.

    Example:
        >>> import torch
        >>> x, bits = torch.ones(99, 64, 5, 5), torch.ones(64, 64, 3, 3)
        >>> conv2d(x, bits, padding=(1, 1))[0, 0, 0, :2].tolist()  # of four taps, and of six
        [256.0, 384.0]
    """

    def plain() -> Tensor:
        return F.conv2d(input, bits, bias, stride, padding, dilation, groups)

    if input.dim() not in (3, 4) or input.is_cuda or not applicable(input, bits, stride):
        return plain()
    images, ends = _padded(input if input.dim() == 4 else input[None], bits, padding, dilation)
    inner = images.permute(0, 2, 3, 1) if _channels_last(images) else images
    found = on_grid(inner, bias) if inner.is_contiguous() else None
    if found is None:
        return plain()
    how = list(stride), list(ends), list(dilation), groups
    form = torch.channels_last if _channels_last(images) or _channels_last(bits) else torch.contiguous_format

    def product() -> Tensor:
        integers = found[0] if inner is images else found[0].permute(0, 3, 1, 2)
        return _finished(_sums(integers, bits, how, form).to(input.dtype), found[1], bias)

    def exact() -> Tensor:
        output: Tensor = _Exact.apply(images, bits, bias, product, _conv2d_backward, *how)
        return output if input.dim() == 4 else output[0]

    return exact_or_plain("torch.ops.onednn.qconv2d_pointwise", exact, plain)


def _channels_last(tensor: Tensor) -> bool:
    """Return whether torch takes the strides for those of channels that are last, also where sizes are 1."""
    least = 0
    for dim in (1, 3, 2, 0):
        if tensor.stride(dim) < least or (dim == 0 and least == tensor.stride(1)):
            return False
        least = tensor.stride(dim) * tensor.shape[dim]
    return True


def _padded(images: Tensor, bits: Tensor, padding: Size | str, dilation: Size) -> tuple[Tensor, Size]:
    """Return images and how many zeros both ends get, as ``torch.nn.functional.conv2d`` makes them of a word."""
    if not isinstance(padding, str):
        return images, padding
    if padding == "valid":
        return images, (0, 0)
    total = [step * (size - 1) for step, size in zip(dilation, bits.shape[2:], strict=True)]
    if any(size % 2 for size in total):
        images = F.pad(images, (0, total[1] % 2, 0, total[0] % 2))
    return images, [size // 2 for size in total]


def _sums(integers: Tensor, bits: Tensor, how: tuple[Any, ...], form: torch.memory_format) -> Tensor:
    """Return the sums of a convolution as float32, in the order in memory that float's have. Overwrites integers."""
    operators: Any = torch.ops.onednn
    ones, zeros = torch.ones(len(bits)), torch.zeros(len(bits), dtype=torch.int64)
    images = integers.contiguous(memory_format=torch.channels_last)
    images = images.bitwise_xor_(-128).view(torch.uint8)  # 128 more: the operator takes unsigned ones
    weight = bits.to(torch.int8, memory_format=torch.contiguous_format)
    packed = operators.qconv_prepack(weight, ones, 1.0, 128, *how, list(images.shape))
    after: Any = (1.0, 0, torch.float32, "none", [], "")
    sums: Tensor = operators.qconv2d_pointwise(images, 1.0, 128, packed, ones, zeros, None, *how, *after)
    return sums.contiguous(memory_format=form)


def _finished(sums: Tensor, step: float, bias: Tensor | None) -> Tensor:
    if step != 1:
        sums.mul_(step)
    return sums if bias is None else sums.add_(bias.view(-1, *(1 for _ in sums.shape[2:])))


class _Exact(torch.autograd.Function):
    """A product that is computed in any way, with a backward of its factors in float."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        bits: Tensor,
        bias: Tensor | None,
        product: Callable[[], Tensor],
        backward: Callable[..., Sequence[Tensor | None]],
        *how: Any,
    ) -> Tensor:
        ctx.save_for_backward(input, bits)
        ctx.chain, ctx.how = backward, how
        return product()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.chain(*gradients, *ctx.saved_tensors, list(ctx.needs_input_grad[:3]), *ctx.how)
        return *found, None, None, *(None for _ in ctx.how)


def _linear_backward(gradient: Tensor, rows: Tensor, bits: Tensor, needed: list[bool]) -> Sequence[Tensor | None]:
    """Return the gradients of rows, bits and bias, by the products that torch's backward makes."""
    return (
        gradient.mm(bits) if needed[0] else None,
        gradient.t().mm(rows) if needed[1] else None,
        gradient.sum(0) if needed[2] else None,
    )


def _conv2d_backward(
    gradient: Tensor, images: Tensor, bits: Tensor, needed: list[bool], *how: Any
) -> Sequence[Tensor | None]:
    """Return the gradients of images, bits and bias."""
    stride, padding, dilation, groups = how
    options = ([len(bits)], stride, padding, dilation, False, [0, 0], groups, needed)
    found: Sequence[Tensor | None] = torch.ops.aten.convolution_backward(gradient, images, bits, *options)
    return found
