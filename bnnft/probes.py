"""Watch the neurons of a network: pre-activation, threshold and output of each binarized layer, by hooks.

Which batch norm and which activation belong to a layer is found by following tensors through one watched
forward, not by the order of modules: pooling, dropout or reshaping may stand between them. Afterwards plain
forward hooks on the found modules do.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bnnft.sites import Site


class Chain(NamedTuple):
    """What follows one binarized layer.

    Attributes:
        layer: qualified name of the layer.
        norm: qualified name of its batch norm, or ``None``: then the threshold is 0.
        activation: qualified name of the module whose output is the layer's binary neurons, or ``None``.
        reason: why there are no neuron outputs or no fixed threshold; empty if there are.
        last: no binarized layer follows: the layer's outputs are class scores.
        calls: how often the activation runs for each run of the layer: more than once where layers share it.
        call: which of these calls belongs to this layer.
    """

    layer: str
    norm: str | None = None
    activation: str | None = None
    reason: str = ""
    last: bool = False
    calls: int = 1
    call: int = 0


@dataclass
class Observation:
    r"""What one layer computed in the watched forwards, a tensor for each call.

    Attributes:
        preactivations: inputs of the batch norm, shape (N, neurons, \*positions); without a batch norm the
            inputs of the activation, and of the last layer the outputs.
        outputs: binary neuron outputs, same shape; empty for the last layer.
    """

    preactivations: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


def thresholds(norm: Any) -> Tensor:
    """Return the pre-activation at which each neuron behind a batch norm turns, ``mu - beta sqrt(var + eps) / gamma``.

    Args:
        norm: a batch norm with running statistics, with or without learned gamma and beta.

    Returns:
        One threshold a channel; infinite for a dead neuron (gamma = 0), whose output is the sign of beta always.

    Raises:
        ValueError: no running statistics, so that the threshold changes with each batch.

    Example:
        >>> from torch import nn
        >>> thresholds(nn.BatchNorm1d(3))
        tensor([0., 0., 0.])
    """
    mean, variance, gamma, beta = (getattr(norm, n, None) for n in ("running_mean", "running_var", "weight", "bias"))
    if mean is None or variance is None:
        raise ValueError(f"{type(norm).__name__} has no running statistics: its neurons have no fixed threshold")
    mean, variance = mean.detach(), variance.detach()
    gamma = torch.ones_like(mean) if gamma is None else gamma.detach()
    beta = torch.zeros_like(mean) if beta is None else beta.detach()
    threshold: Tensor = mean - beta * (variance + norm.eps).sqrt() / gamma
    always = torch.where(beta >= 0, -torch.inf, torch.inf).to(threshold)
    return torch.where(gamma == 0, always, threshold)


class _Node(NamedTuple):
    operation: str
    module: str  # innermost module that ran it
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def _tensors(tree: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


class Trace(TorchFunctionMode):
    """Records which operation made which tensor from which, while active; changes nothing of the run.

    It keeps a reference to every intermediate result, so use it for one batch and drop it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {module: name for name, module in model.named_modules()}
        self._within: list[str] = []
        self._made: set[int] = set()
        self._nodes: list[_Node] = []
        self._calls: dict[str, list[tuple[Tensor, ...]]] = {}  # outputs of each module, call by call
        self._hooks = ExitStack()

    def __enter__(self) -> "Trace":
        for module in self._names:
            self._hooks.callback(module.register_forward_pre_hook(self._enter_module, with_kwargs=True).remove)
            self._hooks.callback(module.register_forward_hook(self._leave_module, with_kwargs=True).remove)
        self._hooks.enter_context(torch.compiler.set_stance("force_eager"))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._record(getattr(func, "__name__", ""), _tensors((args, kwargs)), _tensors(result))
        return result

    def _record(self, operation: str, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        outputs = tuple(o for o in outputs if all(o is not i for i in inputs))
        if inputs and outputs:
            self._made.update(map(id, outputs))
            self._nodes.append(_Node(operation.strip("_"), self._within[-1] if self._within else "", inputs, outputs))

    def _enter_module(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._within.append(self._names[module])

    def _leave_module(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # an autograd.Function is no torch function: its module is then the smallest thing that is seen
        if all(id(made) not in self._made for made in _tensors(output)) or not any(module.children()):
            self._record(type(module).__name__, _tensors((args, kwargs)), _tensors(output))
        self._calls.setdefault(self._within.pop(), []).append(_tensors(output))

    def chains(self, sites: Sequence[Site]) -> dict[str, tuple[Chain, Observation]]:
        """Return for each layer that ran its chain and what it computed."""
        consumers: dict[int, list[_Node]] = {}
        for node in self._nodes:
            for tensor in node.inputs:
                consumers.setdefault(id(tensor), []).append(node)
        found = {}
        layers = dict.fromkeys(site.layer for site in sites if any(self._calls.get(site.layer, ())))
        for layer in layers:
            found[layer] = self._follow(layer, layers.keys() - {layer}, consumers)
        return found

    def _follow(self, layer: str, others: set[str], consumers: Mapping[int, list[_Node]]) -> tuple[Chain, Observation]:
        """Walk from a layer's output to the first two-valued tensor, breadth first."""
        start = self._calls[layer][0][0]
        reached, norm, reason, last = [start], None, "", True
        seen = {id(start)}
        norm_input: Tensor | None = None
        while reached:
            tensor = reached.pop(0)
            for node in consumers.get(id(tensor), ()):
                if any(node.module == other or node.module.startswith(f"{other}.") for other in others):
                    last = False
                    continue
                if node.operation == "batch_norm" and norm_input is None:
                    norm, norm_input = node.module, tensor
                if node.operation in ("add", "iadd", "sub", "isub") and len(node.inputs) > 1:
                    reason = "something is added to it before it is binarized, so it has no fixed threshold"
                for output in node.outputs:
                    if id(output) in seen or not output.is_floating_point():
                        continue
                    seen.add(id(output))
                    if _two_valued(output):
                        observation = Observation([tensor if norm_input is None else norm_input], [output])
                        return self._chain(layer, norm, reason, output), observation
                    reached.append(output)
        if last:
            return Chain(layer, norm, last=True), Observation([start])
        return Chain(layer, norm, None, "its outputs are not binary"), Observation()

    def _chain(self, layer: str, norm: str | None, reason: str, output: Tensor) -> Chain:
        """Name the innermost module that returned the binary outputs, and which of its calls it was."""
        for activation in sorted(self._calls, key=len, reverse=True):
            calls = self._calls[activation]
            for number, made in enumerate(calls):
                if any(output is tensor for tensor in made):
                    each = max(1, len(calls) // len(self._calls[layer]))
                    return Chain(layer, norm, activation, reason, calls=each, call=number % each)
        return Chain(layer, norm, None, reason or "its binary outputs are not the output of a module")


def _two_valued(tensor: Tensor) -> bool:
    magnitude = tensor.detach().abs()
    return tensor.numel() > 1 and bool(magnitude.max() > 0) and bool((magnitude == magnitude.max()).all())


@contextmanager
def watch(model: nn.Module, chains: Sequence[Chain], graph: bool = False) -> Iterator[dict[str, Observation]]:
    """Collect what the layers of these chains compute in every forward inside the context.

    Args:
        model: the module that the chains' names belong to.
        chains: from :meth:`Trace.chains`, those with neuron outputs and the last layer.
        graph: keep the outputs attached to the autograd graph, and let them require gradients.

    Yields:
        For each chain's layer its :class:`Observation`, filled as the model runs.

    Example:
        >>> import torch
        >>> from bnnft.nn import BinaryActivation, BinaryLinear
        >>> model = torch.nn.Sequential(BinaryLinear(4, 3), torch.nn.BatchNorm1d(3), BinaryActivation())
        >>> with watch(model.eval(), [Chain("0", norm="1", activation="2")]) as seen:
        ...     _ = model(torch.ones(5, 4))
        >>> seen["0"].preactivations[0].shape, seen["0"].outputs[0].shape
        (torch.Size([5, 3]), torch.Size([5, 3]))
    """
    seen = {chain.layer: Observation() for chain in chains}

    def keep(into: list[Tensor], chain: Chain, inputs: bool) -> Any:
        called = count()

        def hook(module: nn.Module, args: Any, output: Any = None) -> None:
            if next(called) % chain.calls != chain.call:
                return
            tensor: Tensor = args[0] if inputs else output
            if graph and not inputs and not tensor.requires_grad:
                tensor.requires_grad_()
            into.append(tensor if graph and not inputs else tensor.detach())

        return hook

    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for chain in chains:
            observation = seen[chain.layer]
            if chain.last or chain.activation is None:
                layer = model.get_submodule(chain.layer)
                hooks = [layer.register_forward_hook(keep(observation.preactivations, chain, inputs=False))]
            else:
                activation = model.get_submodule(chain.activation)
                norm, alone = (
                    (activation, chain) if chain.norm is None else (model.get_submodule(chain.norm), Chain(""))
                )
                hooks = [
                    norm.register_forward_pre_hook(keep(observation.preactivations, alone, inputs=True)),
                    activation.register_forward_hook(keep(observation.outputs, chain, inputs=False)),
                ]
            for hook in hooks:
                stack.callback(hook.remove)
        yield seen
