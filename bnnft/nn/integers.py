"""Products of bits with small integers, computed in int8 with int32 sums: several times as fast and equal in every bit.

As long as no sum leaves 2**24, float32 rounds nothing either, so that the result is the same to the last bit, on every
device and for every number of threads. An input qualifies where it holds integers of int8 times one power of two, as
binary activations, their zero padding and pixels on a dyadic grid do; each batch is looked at. Everything else is
computed in float, as ``torch.nn`` does it: other types of tensors, transforms, compiled and traced graphs, autocast,
what modes of torch watch, and what is too small to gain. The backward is in float always.

``devices`` holds the types of devices that integers are used on; empty, it switches them off. ``"cuda"`` may be added
for linear layers. It is not there from the start, since to look at a batch the host has to wait for the device.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

devices = {"cpu"}

_LARGEST = 2**24  # up to here every integer is a float32
_CHUNK = 2**16  # values a thread, few enough to stay in its cache
_IMAGES = 32  # a block of images, for the same reason
# below this, what it takes to look at the input and to convert it is more than what is gained
_LEAST_ROWS, _LEAST_OUTPUTS, _LEAST_FAN_IN = 16, 64, 64

_equal: dict[str, bool] = {}  # whether an operator gave what float gives, when it was first used

Size = Sequence[int]
Product = Callable[[], Tensor]


def linear(input: Tensor, bits: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``torch.nn.functional.linear`` of bits, in integers where these are exact and gain time.

    Args:
        input: ``(*, in_features)``.
        bits: of -1 and +1, ``(out_features, in_features)``.
        bias: ``(out_features,)``; one that does not lie on the input's grid is added in float, in an order of its own.

    Example:
        >>> import torch
        >>> x, bits = torch.ones(16, 64), torch.ones(64, 64)
        >>> bool((linear(x, bits, None) == 64).all())
        True
    """

    def plain() -> Tensor:
        return F.linear(input, bits, bias)

    if not _eager(input, bits) or not (input.is_contiguous() and bits.is_contiguous()) or not _large(input, bits):
        return plain()
    rows = input.view(-1, bits.shape[1])
    found = _on_grid(rows, bits, bias)
    if found is None or (input.is_cuda and (rows.shape[0] <= 16 or rows.shape[1] % 8 or bits.shape[0] % 8)):
        return plain()
    integers, step = found

    def product() -> Tensor:
        sums = torch._int_mm(integers, bits.to(torch.int8).t()).to(input.dtype)
        return _finished(sums, step, bias)

    def exact() -> Tensor:
        output: Tensor = _Linear.apply(rows, bits, bias, product)
        return output.view(*input.shape[:-1], -1)

    return _tried(f"torch._int_mm on {input.device.type}", exact, plain)


def conv2d(
    input: Tensor,
    bits: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
) -> Tensor:
    """Return ``torch.nn.functional.conv2d`` of bits, in integers where these are exact and gain time.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``.
        bits: of -1 and +1, ``(out_channels, C / groups, height, width)``.
        bias: as of :func:`linear`.
        stride, padding, dilation, groups: as of ``torch.nn.functional.conv2d``.

    Example:
        >>> import torch
        >>> x, bits = torch.ones(2, 64, 5, 5), torch.ones(64, 64, 3, 3)
        >>> conv2d(x, bits, None, (1, 1), (1, 1), (1, 1), 1)[0, 0, 0, 0].item()  # a corner has four taps
        256.0
    """

    def plain() -> Tensor:
        return F.conv2d(input, bits, bias, stride, padding, dilation, groups)

    if not _eager(input, bits) or input.device.type != "cpu" or not _large(input, bits):
        return plain()
    images, ends = _padded(input if input.dim() == 4 else input[None], bits, padding, dilation)
    inner = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    order = (0, 2, 3, 1) if inner else (0, 1, 2, 3)
    found = _on_grid(images.permute(order), bits, bias) if images.permute(order).is_contiguous() else None
    if found is None:
        return plain()
    integers, step = found
    integers = integers.permute(0, 3, 1, 2) if inner else integers
    how = list(stride), list(ends), list(dilation), groups
    last = inner or (bits.is_contiguous(memory_format=torch.channels_last) and not bits.is_contiguous())

    def product() -> Tensor:
        return _finished(_convolved(integers, bits, how, last).to(input.dtype), step, bias)

    def exact() -> Tensor:
        output: Tensor = _Conv2d.apply(images, bits, bias, product, how)
        return output if input.dim() == 4 else output[0]

    return _tried("torch.ops.onednn.qconv2d_pointwise", exact, plain)


def _eager(input: Tensor, bits: Tensor) -> bool:
    """Return whether these are plain tensors that nobody but torch's own autograd computes with or looks at."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or input.device.type not in devices:
        return False
    kind = input.device.type
    usual = type(input) in (Tensor, nn.Parameter) and type(bits) is Tensor and input.device == bits.device
    if not usual or input.dtype != bits.dtype or input.dtype not in (torch.float32, torch.float64):
        return False
    if torch.is_autocast_enabled(kind) or (kind == "cpu" and not _fast_on_cpu()):
        return False
    try:
        watched = torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        return not (watched or transformed or torch.autograd.forward_ad._current_level >= 0)
    except AttributeError:
        _give_up("what tells of modes and transforms", "it is missing")
        devices.clear()
        return False


def _fast_on_cpu() -> bool:
    """Return whether oneDNN has integer products for this processor; elsewhere they are slow loops."""
    return torch._C._get_mkldnn_enabled() and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _large(input: Tensor, bits: Tensor) -> bool:
    """Return whether there is enough to compute, and few enough terms in a sum for float32 to round none."""
    fan_in = bits[0].numel() if len(bits) else 0
    rows = input.numel() // max(bits.shape[1], 1)
    return rows >= _LEAST_ROWS and len(bits) >= _LEAST_OUTPUTS and _LEAST_FAN_IN <= fan_in <= _LARGEST // 256


@torch.no_grad()
def _on_grid(values: Tensor, bits: Tensor, bias: Tensor | None) -> tuple[Tensor, float] | None:
    """Return int8 integers and a power of two of which the values, contiguous, are the products, if they are."""
    factor = 1.0
    integers = _integers(values, factor)
    if integers is None:
        low, high = (float(end) for end in values.aminmax())
        needed = max(low / -128, high / 127)
        if not 2**-32 < needed < 2**32:  # NaN neither
            return None
        factor = 2.0 ** math.floor(-math.log2(needed))
        integers = None if factor == 1 else _integers(values, factor)
    if integers is None:
        return None
    if bias is not None:
        steps = bias.double() * factor
        if not torch.equal(steps.round(), steps) or float(steps.abs().max()) > _LARGEST // 2:
            return None
    return integers, 1 / factor


def _integers(values: Tensor, factor: float) -> Tensor | None:
    integers = torch.empty_like(values, dtype=torch.int8)
    size = _CHUNK * torch.get_num_threads() if values.device.type == "cpu" else max(values.numel(), 1)
    for part, made in zip(values.view(-1).split(size), integers.view(-1).split(size), strict=True):
        wanted = part if factor == 1 else part * factor
        made.copy_(wanted)
        # a fraction of the time of torch.equal
        if float((made.to(wanted.dtype) - wanted).abs_().sum()) != 0:
            return None
    return integers


def _padded(images: Tensor, bits: Tensor, padding: Size | str, dilation: Size) -> tuple[Tensor, Size]:
    """Return images and the padding of both ends, as ``torch.nn.functional.conv2d`` makes them of a word."""
    if not isinstance(padding, str):
        return images, padding
    if padding == "valid":
        return images, (0, 0)
    total = [step * (size - 1) for step, size in zip(dilation, bits.shape[2:], strict=True)]
    if any(size % 2 for size in total):
        images = F.pad(images, (0, total[1] % 2, 0, total[0] % 2))
    return images, [size // 2 for size in total]


def _convolved(integers: Tensor, bits: Tensor, how: tuple[Any, ...], last: bool) -> Tensor:
    """Return the sums of a convolution as float32, in the order in memory that float's would have."""
    operators: Any = torch.ops.onednn
    ones, zeros = torch.ones(len(bits)), torch.zeros(len(bits), dtype=torch.int64)
    blocks = (integers ^ -128).view(torch.uint8).split(_IMAGES)  # unsigned, with a zero of 128
    weight = bits.to(torch.int8, memory_format=torch.contiguous_format)
    packed = operators.qconv_prepack(weight, ones, 1.0, 128, *how, list(blocks[0].shape))
    output = None
    for number, block in enumerate(blocks):
        block = block.contiguous(memory_format=torch.channels_last)
        after: Any = (1.0, 0, torch.float32, "none", [], "")
        sums = operators.qconv2d_pointwise(block, 1.0, 128, packed, ones, zeros, None, *how, *after)
        if output is None:
            form = torch.channels_last if last else torch.contiguous_format
            output = torch.empty((len(integers), *sums.shape[1:]), memory_format=form)
        output[number * _IMAGES :][:_IMAGES].copy_(sums)
    assert output is not None
    return output


def _finished(sums: Tensor, step: float, bias: Tensor | None) -> Tensor:
    if step != 1:
        sums.mul_(step)
    return sums if bias is None else sums.add_(bias.view(-1, *(1 for _ in sums.shape[2:])))


def _tried(operator: str, exact: Product, plain: Product) -> Tensor:
    """Return what an operator of torch's makes, or float's if the operator fails or has changed."""
    if not _equal.get(operator, True):
        return plain()
    try:
        output = exact()
        if operator not in _equal:
            with torch.no_grad():
                _equal[operator] = torch.equal(output, plain())
        if _equal[operator]:
            return output
        reason = "it does not give what float gives"
    except Exception as error:  # it is private, and may become anything
        reason = f"{type(error).__name__}: {error}"
    _equal[operator] = False
    _give_up(operator, reason)
    return plain()


def _give_up(what: str, reason: str) -> None:
    warnings.warn(f"{what} of torch {torch.__version__} is not used, and float in its place: {reason}", stacklevel=2)


class _Linear(torch.autograd.Function):
    """The product of rows and bits, with the backward of ``torch.nn.functional.linear``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bits: Tensor, bias: Tensor | None, product: Product) -> Tensor:
        ctx.save_for_backward(rows, bits)
        return product()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (rows, bits), needed = gradients, ctx.saved_tensors, ctx.needs_input_grad
        return (
            gradient.mm(bits) if needed[0] else None,
            gradient.t().mm(rows) if needed[1] else None,
            gradient.sum(0) if needed[2] else None,
            None,
        )


class _Conv2d(torch.autograd.Function):
    """The convolution of images with bits, with the backward of ``torch.nn.functional.conv2d``."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, bits: Tensor, bias: Tensor | None, product: Product, how: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(images, bits)
        ctx.how, ctx.biases = how, None if bias is None else list(bias.shape)
        return product()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (images, bits), (stride, padding, dilation, groups) = ctx.saved_tensors, ctx.how
        options = (ctx.biases, stride, padding, dilation, False, [0, 0], groups, list(ctx.needs_input_grad[:3]))
        found: Any = torch.ops.aten.convolution_backward(gradients[0], images, bits, *options)
        return *found, None, None
