"""Which layers of a model there are to measure."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnnft.injection.finder import Finder
from bnnft.injection.sites import binarized_weights
from bnnft.tracing.blocks import Block
from bnnft.tracing.trace import Trace


class Binarized(NamedTuple):
    """A layer with binarized weights.

    Attributes:
        layer: qualified name of the module that computes with them.
        fan_in: number of weights of one output neuron.
        scale: half of what a flip moves each output neuron by; ``None`` if it is 1 for all.
        used: something was computed with the weights.
    """

    layer: str
    fan_in: int
    scale: Tensor | None
    used: bool


def binarized(finder: Finder) -> list[Binarized]:
    """Return the layers whose binarized weights were found by watching a forward, once for each weight."""
    found, first = [], finder.first_names()
    for site in finder.sites():
        owner, layer = site.name.rpartition(".")[0], site.layer
        inner = owner.removeprefix(layer).lstrip(".") if owner.startswith(layer) else ""
        if inner and not inner.startswith("parametrizations"):
            layer = owner  # computed with in the forward of a module around it
        found.append(Binarized(layer, site.fan_in, site.scale, first[site.name] in finder.uses))
    return found


def could_be_binarized(model: nn.Module) -> list[str]:
    """Return the names of modules with parameters of their own that may be weights; scripted ones can't be watched."""
    return [
        name
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
        and any(nn.parameter.is_lazy(weight) or weight.dim() > 1 for weight in module.parameters(recurse=False))
    ]


def named_blocks(model: nn.Module, chains: Mapping[str, Sequence[str | None]]) -> list[Block]:
    """Return blocks with named batch norms and activations.

    Args:
        model: whose modules are named.
        chains: ``{layer: [norm or None, activation]}`` by qualified names; of the layer its end is enough.

    Raises:
        ValueError: a name is not that of one module, or the layer has no parameters.
    """
    modules = dict(model.named_modules())
    blocks = []
    for layer, (norm, activation) in chains.items():
        full = [name for name in modules if name == layer or name.endswith(f".{layer}")]
        if len(full) != 1:
            raise ValueError(f"chains: {layer!r} names {len(full)} modules of {type(model).__name__}, not one")
        for name in (norm, activation):
            if name is not None and name not in modules:
                raise ValueError(f"chains: {type(model).__name__} has no module {name!r}")
        if not any(True for _ in modules[full[0]].parameters()):
            there = ", ".join(name.rpartition(".")[0] for name in binarized_weights(model)) or "none that is known"
            raise ValueError(f"chains: {layer!r} is no binarized layer; there are {there}")
        blocks.append(Block(full[0], norm, activation))
    return blocks


def alone(block: Block, trace: Trace) -> Block:
    """Return a block of named modules; they must run as often as its layer, and so for no other one."""
    runs = [call.module for call in trace.calls]
    for name in (block.norm, block.activation):
        if name is not None and runs.count(name) != runs.count(block.layer):
            return Block(block.layer, reason=f"{name} runs more or less often than the layer")
    return block
