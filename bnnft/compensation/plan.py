"""What can be compensated in a model: its layers with stored bits, and the batch norms behind them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnnft.injection.finder import Finder
from bnnft.injection.sites import Site, Weights, first_names
from bnnft.nn.layers import StoredBits
from bnnft.tracing.binary import two_values
from bnnft.tracing.blocks import Block, find_blocks
from bnnft.tracing.trace import Node, Trace

# linear maps whose second operand is the weight
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
MAPS = ("linear", "matmul", "mm", *CONVOLUTIONS)
_FEW_BITS = 32  # of a kernel: one of them moves a whole channel


class Layer(NamedTuple):
    """A layer whose sums can be corrected.

    Attributes:
        name: qualified name of the module that computes with the weight.
        site: its stored bits.
        doubt: why scaling does not help there, empty where it does.
        norm: qualified name of the batch norm behind it, empty if there is none.
        bias: something is added to its sums before they reach batch norm or the model's end.
        last: its outputs are class scores.
        reason: why there is no known threshold behind it; empty if there is.
    """

    name: str
    site: Site
    doubt: str = ""
    norm: str = ""
    bias: bool = False
    last: bool = False
    reason: str = ""


class Plan(NamedTuple):
    """What was found in one forward.

    Attributes:
        layers: whose sums can be corrected.
        norms: qualified names of the batch norms that use running statistics.
        left_out: names of weights whose sums can't be corrected, with reasons.
        unfixed: layers behind which a batch norm takes the statistics of the batch, and this norm.
    """

    layers: tuple[Layer, ...]
    norms: tuple[str, ...]
    left_out: dict[str, str]
    unfixed: dict[str, str]


class Planner:
    """Watches one forward of a model, clean or under flips, and makes the plan of it.

    Args:
        model: any module.
        weights: patterns or a function that select weights.
    """

    def __init__(self, model: nn.Module, weights: Weights | None = None) -> None:
        self._model, self._finder, self._trace = model, Finder(model, weights), Trace(model)
        own = [module for module in model.modules() if isinstance(module, StoredBits)]
        self._finder.constants = [flips.places for module in own for flips in module.flips]  # lent, and no batch

    def __enter__(self) -> "Planner":
        self._finder.__enter__()
        self._trace.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._trace.__exit__(*exception)
        self._finder.__exit__(*exception)

    def plan(self) -> Plan:
        """Return the plan.

        Raises:
            RuntimeError: the forward could not be watched.
        """
        trace = self._trace
        if trace.error is not None:
            raise RuntimeError(f"the forward could not be traced: {trace.error}") from trace.error
        first = first_names(self._model)
        used = [site for site in self._finder.findings.sites() if first[site.name] in self._finder.findings.uses]
        layers, left_out, unfixed = list[Layer](), dict[str, str](), dict[str, str]()
        blocks = find_blocks(trace, [site.layer for site in used])
        for site in used:
            nodes = [node for node in trace.nodes if is_map_with(node, site)]
            name = nodes[0].module if nodes else site.layer
            if reason := self._fault(nodes, name, site, used):
                left_out[site.name] = reason
                continue
            block = blocks[name][0] if name in blocks else Block(name)
            norm = next(self._norms(block), None)
            layers.append(_layer(name, site, block, norm, nodes[0]))
            if norm is not None and trace.thresholds.get(norm.results[0]) is None:
                unfixed[name] = norm.module or "its batch norm"
        norms = [node.module for node in trace.nodes if _is_fixed_norm(trace, node)]
        return Plan(tuple(layers), tuple(dict.fromkeys(norms)), left_out, unfixed)

    def _fault(self, nodes: list[Node], name: str, site: Site, sites: list[Site]) -> str:
        """Return why the sums with a weight can't be corrected, nothing if they can."""
        if not nodes:
            return f"{name or type(self._model).__name__} uses it otherwise than as the weight of {', '.join(MAPS)}"
        if len({node.module for node in nodes}) > 1:
            return "several modules compute with it"
        if any(other is not site and is_map_with(nodes[0], other) for other in sites):
            return f"{name} computes with several weights of its size"
        operand = _weight(nodes[0])
        found = None if operand is None else two_values(operand, one_is_enough=True)
        return "" if found is not None and found.symmetric else "its two values are not -c and c"

    def _norms(self, block: Block) -> Iterator[Node]:
        """Yield the call of the batch norm behind a layer."""
        trace, route = self._trace, block.route
        starts = [call.outputs[0] for call in trace.calls if call.module == block.layer and call.outputs]
        if route is None or not route.normed or not starts:
            return
        reached = {starts[0]}
        for node in trace.nodes:
            if not reached.isdisjoint(node.inputs):
                if node.operation == "batch_norm":
                    yield node
                reached.update(node.outputs)


def is_map_with(node: Node, site: Site) -> bool:
    """Return whether an operation is a linear map in the layer of a site, with a weight of its size."""
    weight = _weight(node) if node.operation in MAPS and node.module == site.layer else None
    return weight is not None and weight.numel() == site.weight.numel()


def _argument(node: Node, place: int, *names: str) -> Any:
    call: tuple[Any, Any, Any] = node.call or (None, (), {})
    _, args, kwargs = call
    return args[place] if len(args) > place else next((kwargs[name] for name in names if name in kwargs), None)


def _weight(node: Node) -> Tensor | None:
    weight = _argument(node, 1, "weight", "other")
    return weight if isinstance(weight, Tensor) else None


def _layer(name: str, site: Site, block: Block, norm: Node | None, node: Node) -> Layer:
    operations = () if block.route is None else block.route.operations
    doubt = ""
    if any("max_pool" in operation for operation in operations):
        doubt = "max-pooling takes the largest of noisy sums"
    elif node.operation in CONVOLUTIONS and 0 < site.fan_in < _FEW_BITS:
        doubt = f"its kernels have {site.fan_in} bits only"
    bias = _argument(node, 2, "bias") is not None
    return Layer(name, site, doubt, norm.module if norm is not None else "", bias, block.last, block.reason)


def _is_fixed_norm(trace: Trace, node: Node) -> bool:
    fixed = node.operation == "batch_norm" and bool(node.results) and trace.thresholds.get(node.results[0]) is not None
    return fixed and isinstance(getattr(trace.model.get_submodule(node.module), "running_mean", None), torch.Tensor)
