"""Which layers of a model there are to measure."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnnft.injection.finder import Finder
from bnnft.injection.sites import Weights, binarized_weights, first_names
from bnnft.tracing.blocks import Block, Observation, find_blocks
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


def _binarized(finder: Finder) -> list[Binarized]:
    """Return the layers whose binarized weights were found by watching a forward, once for each weight."""
    found, first = [], first_names(finder.model)
    for site in finder.findings.sites():
        owner, layer = site.name.rpartition(".")[0], site.layer
        inner = owner.removeprefix(layer).lstrip(".") if owner.startswith(layer) else ""
        if inner and not inner.startswith("parametrizations"):
            layer = owner  # computed with in the forward of a module around it
        found.append(Binarized(layer, site.fan_in, site.scale, first[site.name] in finder.findings.uses))
    return found


class Found(NamedTuple):
    """A layer that was found: its weights, what follows it, and what it computed in the batch that showed it."""

    weights: Binarized
    block: Block
    seen: Observation


class LayerFinder:
    """Finds binarized layers and what follows them in the batches in which they first run.

    Args:
        model: any module.
        weights: patterns or a function that select weights.
        named: blocks whose modules were named.
        leave_out: is told what, of which layer and why something can't be measured.

    Attributes:
        layers: what was found so far, by layer.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Weights | None,
        named: Sequence[Block],
        leave_out: Callable[[str, str, str], None],
    ) -> None:
        self.layers: dict[str, Found] = {}
        self._model, self._weights, self._leave_out = model, weights, leave_out
        self._named = {block.layer: block for block in named}
        self._ran: set[str] = set()  # modules that ran while they were traced
        self._kinds: set[type] = set()  # classes of binarized layers
        self._awake = True  # trace the next batch

    def blocks(self) -> list[Block]:
        """Return the blocks that are known: found ones, and those that were named."""
        return list((self._named | {name: found.block for name, found in self.layers.items()}).values())

    def trace(self, stack: ExitStack) -> tuple[Finder, Trace] | None:
        """Trace the forward that is to run until the stack is closed, if it may show new layers."""
        unseen = {name: self._model.get_submodule(name) for name in _could_be_binarized(self._model) - self._ran}
        # a layer that has not run yet is traced when it does, if it is of a class that is binarized elsewhere
        if self._awake or not self._kinds.isdisjoint(map(type, unseen.values())):
            finder = Finder(self._model, self._weights)
            return stack.enter_context(finder), stack.enter_context(Trace(self._model))
        for module in unseen.values():
            stack.callback(module.register_forward_pre_hook(self._wake).remove)
        return None

    def _wake(self, module: nn.Module, args: Any) -> None:
        """Trace the next batch, since a module runs that has not run before."""
        self._awake = True

    def learn(self, finder: Finder, trace: Trace) -> dict[str, Found]:
        """Return the layers that a traced forward has shown first."""
        if trace.error is not None:
            raise RuntimeError(f"the forward could not be traced: {trace.error}") from trace.error
        self._awake = False
        self._ran |= {call.module for call in trace.calls}
        weights = _binarized(finder)
        names = [each.layer for each in weights]
        blocks = find_blocks(trace, names)
        new: dict[str, Found] = {}
        for each in weights:
            name = each.layer
            if names.count(name) > 1:
                self._leave_out("margins and importance", name, "it computes with several binarized weights")
            elif name not in blocks and each.used:
                self._leave_out("margins and importance", name, "it does not run as a module")
            elif name in blocks and name not in self.layers:
                block, seen = blocks[name]
                if name in self._named:
                    block, seen = _alone(self._named[name], trace), Observation()  # watched from the first batch on
                new[name] = Found(each, block, seen)
                if block.reason:
                    what = "margins" if block.has_outputs else "margins and importance"
                    self._leave_out("class margin" if block.last else what, name, block.reason)
        for name in self._named.keys() - set(names):
            self._leave_out("margins and importance", name, "it is no binarized layer that runs")
        if not weights:
            self._leave_out("all metrics", type(self._model).__name__, "it computes with no binarized weights")
        self.layers |= new
        self._kinds |= {type(self._model.get_submodule(name)) for name in new}
        return new


def _could_be_binarized(model: nn.Module) -> set[str]:
    """Return the names of modules with parameters of their own that may be weights; scripted ones can't be watched."""
    return {
        name
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
        and any(nn.parameter.is_lazy(weight) or weight.dim() > 1 for weight in module.parameters(recurse=False))
    }


def checked_chains(chains: Mapping[str, Sequence[str | None]]) -> dict[str, Sequence[str | None]]:
    """Return chains as a dict, or raise ValueError unless each layer has a norm, or none, and an activation."""
    for layer, names in chains.items():
        if isinstance(names, str) or len(names) != 2 or names[1] is None:
            raise ValueError(f"chains must map a layer to [norm or None, activation], got {layer!r}: {names!r}")
    return dict(chains)


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
    for layer, (norm, activation) in checked_chains(chains).items():
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


def _alone(block: Block, trace: Trace) -> Block:
    """Return a block of named modules; they must run as often as its layer, and so for no other one."""
    runs = [call.module for call in trace.calls]
    for name in (block.norm, block.activation):
        if name is not None and runs.count(name) != runs.count(block.layer):
            return Block(block.layer, reason=f"{name} runs more or less often than the layer")
    return block
