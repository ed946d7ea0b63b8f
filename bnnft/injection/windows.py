"""When the bits of latent weights are flipped: from a call of a module to the end of the backward that it leads to."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._contextlib import context_decorator
from torch.utils._pytree import tree_leaves

from bnnft.injection.calls import listen, unlisten
from bnnft.injection.saves import hold, release
from bnnft.injection.window import Window
from bnnft.tracing.sharding import is_sharded

_Method = TypeVar("_Method", bound=Callable[..., Any])
_NO_BACKWARD = -1


def _unseen(method: _Method) -> _Method:
    """Hide what a method does from whoever watches operations, a finder of binary weights say.

    Not by a `with` statement, which an interrupt at its end would leave in force.
    """
    hidden: _Method = context_decorator(lambda: torch._C.DisableTorchFunction(), method)  # type: ignore[no-untyped-call]
    return hidden


class Windows:
    """Opens and closes the windows of a context; see :class:`bnnft.injection.latent.LatentFlips` for when.

    Args:
        model: that holds the weights.
        windows: one a weight.
        check: compare the bits whenever they are put back.
    """

    def __init__(self, model: nn.Module, windows: Sequence[Window], check: bool) -> None:
        self.windows, self._check = windows, check
        sharded = any(is_sharded(window.site.weight) for window in windows)
        self._gathering = [module for module in model.modules() if sharded and hasattr(module, "reshard")]
        self._drop_gathered()
        self._of, self._owners = _holders(model, windows)
        self._always = self._closed = False
        self._calls: list[nn.Module] = []  # that run now, the outermost first
        self._touched: dict[Window, bool] = {}  # by these calls, and whether it awaited a backward before them
        self._backward: int | None = None  # the number of the backward at whose end those that it reached are closed
        self._reached: set[Window] = set()

    def start(self) -> None:
        """Listen to calls and gradients; without gradients, open all windows."""
        self._always = not torch.is_grad_enabled()
        for window in self.windows:
            _check_shards(window, self._of)
            window.latent = hold(window.site, window)
            self._listen_to_gradient(window)
        for module in self._owners if self._always else self._of:
            listen(module, self)
        if self._always:
            self._open(self.windows)

    @_unseen
    def before_call(self, module: nn.Module) -> None:
        """Open the windows of what a module holds."""
        windows, backward = self._of[module], torch._C._current_graph_task_id()
        if self._always:
            return
        if backward == _NO_BACKWARD:
            self._backward = None  # one that an error ended has not said so
            self._calls.append(module)
            for window in windows:
                self._touched.setdefault(window, window.awaits_backward)
        else:  # checkpointing computes again
            self._close_after(backward, windows)
        self._open(windows)

    @_unseen
    def after_call(self, module: nn.Module, output: Any) -> None:
        """Wait for the backward, or close the windows if none can follow."""
        if self._always:
            return
        leaves = [leaf for leaf in tree_leaves(output) if not isinstance(leaf, bool | int | float | str | None)]
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                leaf.register_hook(partial(self._reach_output, self._of[module]))  # type: ignore[no-untyped-call]
        if torch._C._current_graph_task_id() == _NO_BACKWARD and module in self._calls:
            while self._calls.pop() is not module:  # those above it said no end, as after an interrupt
                pass
            if not self._calls:
                graph = any(not isinstance(leaf, Tensor) or leaf.requires_grad for leaf in leaves)
                self._settle(torch.is_grad_enabled(), graph)

    @_unseen
    @torch.no_grad()
    def restore(self, windows: Iterable[Window]) -> None:
        """Close windows.

        Raises:
            RuntimeError: weights were written to; all that can be put back is.
        """
        _raise_faults([window.restore(self._check) for window in windows])

    def close(self) -> None:
        """Close all windows for good and leave no hook behind; more calls do nothing."""
        self._closed = True
        try:
            self.restore(self.windows)
            self._drop_gathered()
        finally:
            for window in self.windows:
                if window.hook is not None:
                    window.hook.remove()
                release(window.site, window)
            for module in self._of:
                unlisten(module, self)

    @_unseen
    @torch.no_grad()
    def _open(self, windows: Iterable[Window]) -> None:
        _raise_faults([window.flip(self._check) for window in windows])
        for window in windows:
            self._listen_to_gradient(window)

    def _drop_gathered(self) -> None:
        """Let FSDP2 gather shards anew: after a forward without a backward, it keeps those of the outermost module."""
        for module in self._gathering:
            module.reshard()  # type: ignore[operator]

    def _settle(self, gradients: bool, graph: bool) -> None:
        """At the end of an outermost call, close the windows that no backward can need."""
        touched, self._touched = self._touched, {}
        for window, awaited in touched.items():
            window.awaits_backward = awaited or (gradients and (graph or window.site.weight.requires_grad))
        done = [window for window in touched if not window.awaits_backward]
        if done:
            self.restore(done)
            self._drop_gathered()

    def _close_after(self, backward: int, windows: Iterable[Window]) -> None:
        """Close windows at the end of a backward: of the outermost one, if it is run within another."""
        self._reached.update(windows)
        if self._backward is None:
            self._backward = backward
            Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        reached, self._reached, self._backward = self._reached, set(), None
        self.restore([window for window in self.windows if window in reached])

    def _reach_output(self, windows: Sequence[Window], gradient: Tensor) -> None:
        """Backward has come to what a call under flips has returned."""
        if self._closed:
            raise RuntimeError(
                f"{', '.join(window.site.name for window in windows)}: backward runs after the context of its flips "
                "was left, where the bits are clean again (modified by an inplace operation). Run it inside"
            )
        self._open(windows)
        self._close_after(torch._C._current_graph_task_id(), windows)

    def _reach_weight(self, window: Window, gradient: Tensor) -> Tensor | None:
        """Backward has come to a weight, whose gradient is complete."""
        if not window.seen:
            raise RuntimeError(
                f"{window.site.name}: it has a gradient, but no module that holds it was called under its flips, so "
                "that the model computed with clean bits. Call modules instead of their forward"
            )
        if window.open and not self._always:
            if window.stepped_in_backward:
                self.restore([window])
            else:
                self._close_after(torch._C._current_graph_task_id(), [window])
        return window.through(gradient)

    def _listen_to_gradient(self, window: Window) -> None:
        weight: Any = window.site.weight
        if window.hook is None and weight.requires_grad:
            window.hook = weight.register_hook(partial(self._reach_weight, window))


def _holders(model: nn.Module, windows: Sequence[Window]) -> tuple[dict[nn.Module, list[Window]], list[nn.Module]]:
    """Return for each module the windows of what it holds, itself or in its parts, and all that hold one themselves."""
    modules, of = dict(model.named_modules(remove_duplicate=False)), dict[nn.Module, dict[Window, None]]()
    named = {id(window.site.weight): {window.site.layer} for window in windows}
    owners: dict[nn.Module, set[int]] = {}
    for name, module in modules.items():
        for weight in module._parameters.values():
            if id(weight) in named:
                named[id(weight)].add(name)
                owners.setdefault(module, set()).add(id(weight))
    for window in windows:
        if not any(id(window.site.weight) in own for own in owners.values()):
            raise ValueError(f"{window.site.name} is no parameter of {type(model).__name__} now")
        for name in named[id(window.site.weight)] & modules.keys():
            parts = name.split(".") if name else []
            for end in range(len(parts) + 1):
                of.setdefault(modules[".".join(parts[:end])], {})[window] = None
    return {module: list(own) for module, own in of.items()}, list(owners)


def _check_shards(window: Window, of: Mapping[nn.Module, Sequence[Window]]) -> None:
    weight = window.site.weight
    if not is_sharded(weight):
        return
    if window.stepped_in_backward:
        raise RuntimeError(f"{window.site.name}: its shards are updated within the backward, while bits are flipped")
    if window.exact and any(hasattr(module, "unshard") for module, windows in of.items() if window in windows):
        raise RuntimeError(f"{window.site.name}: gradient='exact' can't be had under FSDP2, where no hook sees it")


def _raise_faults(faults: Iterable[str | None]) -> None:
    found = [fault for fault in faults if fault]
    if found:
        raise RuntimeError(
            "weights were written to while their bits were flipped, so they can't be restored exactly "
            f"({'; '.join(found)}). Update weights outside of the flipped part"
        )
