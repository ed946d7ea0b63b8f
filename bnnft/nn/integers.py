"""Where products of bits are computed in integers: for what inputs, and when nobody but torch's autograd looks.

``devices`` holds the types of devices that integers are used on; empty, it switches them off. ``"cuda"`` may be added
for linear layers. It is not there from the start, since to look at a batch the host has to wait for the device.
"""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

devices = {"cpu"}

_EXACT = 2**24  # up to here every integer is a float32
_CHUNK = 2**16  # values a thread, few enough to stay in its cache
# below this, looking at the input and converting input and output take longer than what is gained (measured)
_LEAST_PRODUCTS, _LEAST_PER_VALUE = 2**26, 192

_equal: dict[str, bool] = {}  # whether an operator gave what float gives, when it was first used


def applicable(input: Tensor, bits: Tensor, stride: Sequence[int] = ()) -> bool:
    """Return whether to look for integers: in plain tensors, outside of transforms, graphs, modes and autocast.

    Args:
        input: of a layer, with one dimension behind its features or channels for each stride.
        bits: ``(outputs, ...)``, the weight of the layer.
        stride: steps of the kernel.
    """
    if torch.compiler.is_compiling() or input.device.type not in devices or not _unseen(input.device.type):
        return False
    usual = type(input) in (Tensor, nn.Parameter) and type(bits) is Tensor and input.device == bits.device
    same = input.dtype == bits.dtype and input.dtype in (torch.float32, torch.float64)
    return usual and same and _large(input, bits, stride)


def _unseen(device: str) -> bool:
    """Return whether nobody but torch's own autograd sees what is computed, and the device has integer products."""
    try:
        watched = torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        forward_mode = torch.autograd.forward_ad._current_level >= 0
        if watched or transformed or forward_mode or torch._C._get_tracing_state() or torch.is_autocast_enabled(device):
            return False
        if device != "cpu":
            return not torch.cuda.is_current_stream_capturing()
        # else oneDNN has no integer products for this processor, but slow loops
        return torch._C._get_mkldnn_enabled() and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    except AttributeError as error:
        devices.clear()
        _give_up("What tells of modes and transforms", error)
        return False


def _large(input: Tensor, bits: Tensor, stride: Sequence[int]) -> bool:
    """Return whether there is enough to gain, and not so many terms that float32 might round their sum."""
    uses = input.numel() // max(input.shape[-1 - len(stride)], 1) // math.prod(stride)  # of each bit
    products, values = uses * bits.numel(), input.numel() + uses * len(bits)
    return products >= max(_LEAST_PRODUCTS, _LEAST_PER_VALUE * values) and bits[0].numel() <= _EXACT // 256


@torch.no_grad()
def on_grid(values: Tensor, bias: Tensor | None = None) -> tuple[Tensor, float] | None:
    """Return int8 integers and the power of two of which values are the products, ``None`` if they are not.

    Args:
        values: any contiguous tensor.
        bias: has to be a sum of such powers of two too, or else its addition in float would round.

    Example:
        >>> import torch
        >>> on_grid(torch.tensor([-1.0, 0.25]))
        (tensor([-128,   32], dtype=torch.int8), 0.0078125)
        >>> on_grid(torch.tensor([-1.0, 0.3]))
    """
    factor = 1.0
    integers = _integers(values, factor)
    if integers is None:
        low, high = (float(end) for end in values.aminmax())
        needed = max(low / -128, high / 127)
        if not 2**-32 < needed < 2**32:  # NaN is neither
            return None
        factor = 2.0 ** math.floor(-math.log2(needed))
        integers = None if factor == 1 else _integers(values, factor)
    if integers is None:
        return None
    if bias is not None:
        steps = bias.double() * factor
        if not (torch.equal(steps.round(), steps) and float(steps.abs().max()) < _EXACT // 2):
            return None
    return integers, 1 / factor


def _integers(values: Tensor, factor: float) -> Tensor | None:
    integers = torch.empty_like(values, dtype=torch.int8)
    size = _CHUNK * torch.get_num_threads() if values.device.type == "cpu" else values.numel()
    scratch = values.new_empty(min(size, values.numel()))
    for part, made in zip(torch.split(values.view(-1), size), torch.split(integers.view(-1), size), strict=True):
        wanted = part if factor == 1 else part * factor
        # the sum takes a fraction of the time of torch.equal
        difference = scratch[: len(part)].copy_(made.copy_(wanted)).sub_(wanted)
        if float(difference.abs_().sum()) != 0:
            return None
    return integers


def exact_or_plain(operator: str, exact: Callable[[], Tensor], plain: Callable[[], Tensor]) -> Tensor:
    """Return what a private operator of torch makes, or float's product if it fails or is not what it was.

    Args:
        operator: its name. It is compared with float when it is first used, and not used again after it has failed.
        exact: makes the product by the operator.
        plain: makes it in float.
    """
    if not _equal.get(operator, True):
        return plain()
    reason: object = "It does not give what float gives"
    try:
        output = exact()
        if operator not in _equal:
            with torch.no_grad():
                _equal[operator] = torch.equal(output, plain())
        if _equal[operator]:
            return output
    except Exception as error:  # whatever a private operator may raise
        reason = error
    output = plain()  # raises what is a fault of the arguments
    _equal[operator] = False
    _give_up(operator, reason)
    return output


def _give_up(what: str, reason: object) -> None:
    message = f"{what} is of no use in torch {torch.__version__}: products of bits are computed in float. {reason}"
    warnings.warn(message, stacklevel=4)
