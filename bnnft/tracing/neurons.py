"""Watch the neurons of a network: pre-activation, threshold and output of each binarized layer, by hooks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from bnnft.tracing.blocks import Block, Calls, Observation
from bnnft.tracing.tracking import Place, Tracking


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


@contextmanager
def watch(
    model: nn.Module, chains: Sequence[Block], graph: bool = False, outputs: bool = True
) -> Iterator[dict[str, Observation]]:
    """Collect what the layers of these chains compute in every forward inside the context.

    Args:
        model: the module that the chains' names belong to.
        chains: from :func:`bnnft.tracing.blocks.find_blocks`.
        graph: keep the outputs attached to the autograd graph, and let them require gradients.
        outputs: collect the outputs too, and not the pre-activations alone.

    Yields:
        For each chain's layer its :class:`bnnft.tracing.blocks.Observation`, filled as the model runs.

    Example:
        >>> import torch
        >>> from bnnft.nn import BinaryActivation, BinaryLinear
        >>> model = torch.nn.Sequential(BinaryLinear(4, 3), torch.nn.BatchNorm1d(3), BinaryActivation())
        >>> with watch(model.eval(), [Block("0", norm="1", activation="2")]) as seen:
        ...     _ = model(torch.ones(5, 4))
        >>> seen["0"].preactivations[0].shape, seen["0"].outputs[0].shape
        (torch.Size([5, 3]), torch.Size([5, 3]))
    """
    seen = {chain.layer: Observation() for chain in chains}
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for chain in chains:
            values, neurons = seen[chain.layer].preactivations, seen[chain.layer].outputs
            if chain.norm is not None:
                norm = model.get_submodule(chain.norm)
                stack.callback(norm.register_forward_pre_hook(_keeper(values, chain.norm_calls)).remove)
            elif chain.pooled and chain.activation is not None:
                activation = model.get_submodule(chain.activation)
                stack.callback(activation.register_forward_pre_hook(_keeper(values, chain.activation_calls)).remove)
            else:
                layer = model.get_submodule(chain.layer)
                stack.callback(layer.register_forward_hook(_keeper(values, Calls())).remove)
            if chain.activation is not None and outputs:
                activation = model.get_submodule(chain.activation)
                stack.callback(activation.register_forward_hook(_keeper(neurons, chain.activation_calls, graph)).remove)
        places = {chain.place: chain.layer for chain in chains if chain.place is not None}
        if places and outputs:
            keep = {p: partial(_kept, seen[layer].outputs, graph) for p, layer in places.items()}
            stack.enter_context(Interception(model, keep))
        yield seen


class Interception(Tracking):
    """Gives the results of operations at certain places to functions, while active.

    Args:
        model: the module that is to run.
        functions: of the result, by place; they return what the model is to go on with.
    """

    def __init__(self, model: nn.Module, functions: Mapping[Place, Callable[[Tensor], Tensor]]) -> None:
        super().__init__(model)
        self._functions = functions

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one operation, and what is to see its result."""
        function = self._functions.get(self.place)
        result = func(*args, **kwargs)
        return result if function is None else function(result)


def _kept(into: list[Tensor], graph: bool, result: Tensor) -> Tensor:
    into.append(result if graph else result.detach())
    return result


@contextmanager
def changed_outputs(model: nn.Module, chain: Block, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Run a model with the binary neurons of one layer changed by a function."""
    if chain.place is not None:
        with Interception(model, {chain.place: change}):
            yield
        return
    assert chain.activation is not None
    chosen = selects(chain.activation_calls)

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return change(output) if next(chosen) else output

    handle = model.get_submodule(chain.activation).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def selects(calls: Calls) -> Iterator[bool]:
    """Yield for one call of a shared module after the other whether it is one of these."""
    return (number % calls.of in calls.which for number in count())


def _keeper(into: list[Tensor], calls: Calls, graph: bool = False) -> Any:
    """Return a hook that keeps the output, or as a pre-hook the first input."""
    chosen = selects(calls)

    def hook(module: nn.Module, args: Any, *output: Any) -> None:
        if next(chosen):
            tensor: Tensor = output[0] if output else args[0]
            if graph and not tensor.requires_grad:
                tensor.requires_grad_()
            into.append(tensor if graph else tensor.detach())

    return hook
