"""Watch the neurons of a network: pre-activation, threshold and output of each binarized layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnnft.tracing.axis import Axis
from bnnft.tracing.blocks import Block, Observation
from bnnft.tracing.thresholds import thresholds, thresholds_of_call
from bnnft.tracing.tracking import Looking, identity, operation_name, tensors

__all__ = ["Change", "Observation", "Seen", "thresholds", "watch"]

# what the model is to go on with in the place of a layer's binary outputs
Change = Callable[[Tensor], Tensor]


@contextmanager
def watch(
    model: nn.Module,
    blocks: Sequence[Block],
    graph: bool = False,
    change: Mapping[str, Change] | None = None,
) -> Iterator["Seen"]:
    """Collect what the layers of these blocks compute in every forward inside the context.

    Neurons are known by the way of the tensors that lead to them, whatever else runs beside it.

    Args:
        model: the module that the blocks' names belong to.
        blocks: from :func:`bnnft.tracing.blocks.find_blocks`, or with modules that are named.
        graph: keep the outputs attached to the autograd graph, and let them require gradients.
        change: by layer, what the model goes on with in the place of its binary outputs.

    Yields:
        For each block's layer its :class:`Observation`, filled as the model runs.

    Example:
        >>> import torch
        >>> from bnnft.nn import BinaryActivation, BinaryLinear
        >>> model = torch.nn.Sequential(BinaryLinear(4, 3), torch.nn.BatchNorm1d(3), BinaryActivation())
        >>> with watch(model.eval(), [Block("0", norm="1", activation="2")]) as seen:
        ...     _ = model(torch.ones(5, 4))
        >>> seen["0"].preactivations[0].shape, seen["0"].outputs[0].shape
        (torch.Size([5, 3]), torch.Size([5, 3]))
    """
    seen = Seen({block.layer: Observation() for block in blocks})
    routed = [block for block in blocks if block.route is not None]
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if routed:
            seen.following = stack.enter_context(_Following(model, routed, seen, graph, change or {}))
        for block in blocks:
            if block.route is None:
                _hook(stack, model, block, seen[block.layer], graph, (change or {}).get(block.layer))
        yield seen


class Seen(dict[str, Observation]):
    """What was watched, by layer."""

    following: "_Following | None" = None

    def check(self) -> None:
        """Raise RuntimeError if following the tensors has failed."""
        if self.following is not None and self.following.error is not None:
            raise RuntimeError(f"neurons could not be followed: {self.following.error}") from self.following.error


class _State(NamedTuple):
    """How far a tensor is on the route of a layer."""

    block: Block
    at: int


class _Following(Looking):
    """Follows the outputs of layers along their routes, while active."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        seen: Mapping[str, Observation],
        graph: bool,
        change: Mapping[str, Change],
    ) -> None:
        self._blocks = {block.layer: block for block in blocks}
        unseen = {name[1:] for block in blocks for name in _operations(block) if name.startswith("@")}
        super().__init__(model, only=self._blocks.keys() | unseen)
        self._seen, self._graph, self._change = seen, graph, change
        self._states: dict[Any, list[_State]] = {}
        self._kept: list[Tensor] = []  # while they live, no other tensor has their identity

    def before(self, func: Any, args: Any, kwargs: Any) -> list[_State]:
        """Return how far the operation is on routes, and measure what a batch norm is given."""
        moves = self._moves(operation_name(func), tensors((args, kwargs)))
        for tensor, state in moves:
            route = state.block.route
            if route is not None and route.normed and state.at == route.measured:
                threshold = thresholds_of_call(func, args, kwargs)
                self._seen[state.block.layer].measure(tensor, route.before, threshold)
        return [state for _, state in moves]

    def after(self, noted: list[_State], result: Any) -> Any:
        """Go on along the routes; return what the model is to go on with."""
        for state in noted:
            state = state._replace(at=state.at + 1)
            if state.at < len(_operations(state.block)):
                for tensor in tensors(result):
                    self._reach(tensor, state)
            elif isinstance(result, Tensor) and _two_sizes(result):
                result = _found(result, self._seen[state.block.layer], self._graph, self._change.get(state.block.layer))
        return result

    def left(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> Any:
        """Start at a layer's output; go on after a module whose inside cannot be seen."""
        if name in self._blocks and outputs:
            if self._graph and outputs[0].is_floating_point() and not outputs[0].requires_grad:
                outputs[0].requires_grad_()  # the graph starts here where nothing before is learned
            self._reach(outputs[0], _State(self._blocks[name], 0))
        moves = [state for _, state in self._moves(f"@{name}", inputs)]
        return self.after(moves, outputs[0]) if moves and outputs else None

    def _moves(self, operation: str, given: Sequence[Tensor]) -> list[tuple[Tensor, _State]]:
        """Return the tensors for which an operation is the next one on a route."""
        states = ((tensor, state) for tensor in given for state in self._states.get(identity(tensor), ()))
        return [(t, state) for t, state in states if _operations(state.block)[state.at : state.at + 1] == (operation,)]

    def _reach(self, tensor: Tensor, state: _State) -> None:
        self._kept.append(tensor)
        states = self._states.setdefault(identity(tensor), [])
        if state not in states:
            states.append(state)
            route = state.block.route
            if route is not None and not route.normed and state.at == route.measured:
                self._seen[state.block.layer].measure(tensor, route.before, 0.0)


def _operations(block: Block) -> tuple[str, ...]:
    return () if block.route is None else block.route.operations


def _two_sizes(result: Tensor) -> bool:
    """Return whether a tensor may be binary outputs: one size at most, but for zeros and what is not finite."""
    sizes = result.detach().abs().flatten()
    sizes = sizes[sizes.isfinite() & (sizes > 0)]
    return not sizes.numel() or bool(sizes.max() - sizes.min() <= 1e-3 * sizes.max())


def _found(output: Tensor, seen: Observation, graph: bool, change: Change | None) -> Tensor:
    """Take in the binary outputs of one run; return what the model is to go on with."""
    if change is not None:
        output = change(output)
    if graph and not output.requires_grad:
        output.requires_grad_()
    seen.outputs.append(output if graph else output.detach())
    return output


def _hook(
    stack: ExitStack, model: nn.Module, block: Block, seen: Observation, graph: bool, change: Change | None
) -> None:
    """Watch a layer whose batch norm and activation are modules that were named."""

    def before(norm: Any, module: nn.Module, args: Any, kwargs: Any) -> None:
        value = tensors((args, kwargs))[0]
        fixed = not norm.training and getattr(norm, "running_mean", None) is not None
        seen.measure(value, Axis(1, value.shape[1]), thresholds(norm) if fixed else None)

    def after_layer(module: nn.Module, args: Any, output: Any) -> None:
        value = tensors(output)[0]
        dim = 1 if value.dim() > 3 else value.dim() - 1
        seen.measure(value, None if block.last else Axis(dim, value.shape[dim]), 0.0)

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return _found(output, seen, graph, change)

    if block.norm is not None:
        norm = model.get_submodule(block.norm)
        stack.callback(norm.register_forward_pre_hook(partial(before, norm), with_kwargs=True).remove)
    else:
        stack.callback(model.get_submodule(block.layer).register_forward_hook(after_layer).remove)
    if block.activation is not None:
        stack.callback(model.get_submodule(block.activation).register_forward_hook(after).remove)
