"""Layers that are known: ours, and those of brevitas and bitorch."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from torch import nn

from bnnft.nn import BinaryConv2d, BinaryLinear

# Where the bits of a site are flipped: by the layer that makes them, in the tensor that is made of the parameter, where
# a parameter that holds the bits itself is read, or in the latent weight.
Where = Literal["layer", "made", "stored", "latent"]


# What a rule returns: attributes of a module that hold binarized latent weights, and what its layer makes of zeros.
_Latents = Mapping[str, int | None]


def flips_by_itself(module: nn.Module) -> bool:
    """Return whether a module is a layer of ours that flips the bits that it makes."""
    own = (BinaryLinear, BinaryConv2d)
    return isinstance(module, own) and type(module).forward in [kind.forward for kind in own]


def _own_layers(module: nn.Module) -> _Latents:
    return {"weight": None} if isinstance(module, BinaryLinear | BinaryConv2d) else {}


def _brevitas(module: nn.Module) -> _Latents:
    proxy = getattr(module, "weight_quant", None)
    quantizer = getattr(proxy, "tensor_quant", None)
    name = getattr(quantizer, "original_name", type(quantizer).__name__)  # the first where it is compiled
    ours = type(proxy).__module__.startswith("brevitas.") and name in ("BinaryQuant", "ClampedBinaryQuant")
    return {"weight": 1} if ours else {}


def _bitorch(module: nn.Module) -> _Latents:
    # of linear layers, and of convolutions
    quantizer: Any = getattr(module, "weight_quantization", getattr(module, "_weight_quantize", None))
    if not type(quantizer).__module__.startswith("bitorch.") or quantizer.bit_width != 1:
        return {}
    zeros = {"Sign": 1, "ApproxSign": 1, "SwishSign": 1, "SteHeaviside": -1, "WeightDoReFa": -1}
    name = type(quantizer).__name__
    return {"weight": zeros[name]} if name in zeros else {}  # others are binary in eval mode only, or never


_RULES: tuple[Callable[[nn.Module], _Latents], ...] = (_own_layers, _brevitas, _bitorch)


class Known(NamedTuple):
    """A weight of a layer that is known: what its layer makes of zeros, and where its bits are flipped."""

    name: str
    weight: nn.Parameter
    zero: int | None
    where: Where


def known_weights(model: nn.Module) -> list[Known]:
    """Return the weights of layers that are known to make their bits of the signs of latents."""
    found = []
    for prefix, module in model.named_modules():
        where: Where = "layer" if flips_by_itself(module) else "made"
        for attribute, zero in (item for rule in _RULES for item in rule(module).items()):
            weight = getattr(module, attribute)
            if isinstance(weight, nn.Parameter):
                found.append(Known(f"{prefix}.{attribute}" if prefix else attribute, weight, zero, where))
    return found
