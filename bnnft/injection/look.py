"""Run a model once for a look at what it computes with, without a trace."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_map

from bnnft.injection.finder import Finder
from bnnft.injection.injection import Injection
from bnnft.injection.remarks import without_flips
from bnnft.injection.sites import Weights, binarized_weights
from bnnft.tracing.mode import Hook
from bnnft.tracing.state import unchanged


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Let a model run unseen: what it keeps is put back, and no forward hooks and function modes of others see it.

    Hooks before a forward stay, as some make the weights that it computes with; what others flip does not.
    """
    with unchanged(model), _without_hooks(model), _without_modes():
        yield


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    kept = []
    of_all = [hooks_of_all._global_forward_pre_hooks, hooks_of_all._global_forward_hooks]
    kept_of_all = [dict(hooks) for hooks in of_all]
    for hooks in of_all:
        hooks.clear()
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        before, after = module._forward_pre_hooks, module._forward_hooks
        kept.append((module, dict(before), dict(after), vars(module).pop("flips", None)))
        after.clear()
        for key in [key for key, hook in before.items() if isinstance(hook, Hook)]:
            del before[key]
    try:
        yield
    finally:
        for hooks, own in zip(of_all, kept_of_all, strict=True):
            hooks.update(own)
        for module, before, after, flips in kept:
            for hooks, own in ((module._forward_pre_hooks, before), (module._forward_hooks, after)):
                hooks.clear()
                hooks.update(own)
            if flips is not None:
                module.flips = flips


@contextmanager
def _without_modes() -> Iterator[None]:
    modes: list[Any] = list(_get_current_function_mode_stack())  # type: ignore[no-untyped-call]
    try:
        for _ in modes:
            _pop_mode()  # type: ignore[no-untyped-call]
        for mode in modes:
            if isinstance(mode, DeviceContext):
                _push_mode(mode)  # type: ignore[no-untyped-call]
        yield
    finally:
        while _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            _pop_mode()  # type: ignore[no-untyped-call]
        for mode in modes:
            _push_mode(mode)  # type: ignore[no-untyped-call]


@contextmanager
def in_their_order() -> Iterator[None]:
    """Let modes that are left and entered anew be below those that were entered since, which are left before them."""
    before: list[Any] = list(_get_current_function_mode_stack())  # type: ignore[no-untyped-call]
    yield
    after: list[Any] = list(_get_current_function_mode_stack())  # type: ignore[no-untyped-call]
    new = [mode for mode in after if not any(mode is other for other in before)]
    kept = [mode for mode in before if any(mode is other for other in after)]
    for _ in after:
        _pop_mode()  # type: ignore[no-untyped-call]
    for mode in [*new, *kept]:
        _push_mode(mode)  # type: ignore[no-untyped-call]


def _copied(leaf: Any) -> Any:
    """Return a copy of an argument that a forward may write to, as far as it can be copied."""
    if isinstance(leaf, Tensor):
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)
    try:
        return copy.deepcopy(leaf)
    except Exception:  # a generator, say
        return leaf


def look(injection: Injection, module: nn.Module, args: Any, kwargs: Any) -> None:
    """Run a part of an injection's model without flips on copies of its arguments, and learn what it computes with.

    What is outside of the model, as counters in a module of Python, sees one run more.

    Raises:
        RuntimeError: flips would not reach the bits that it computes with.
    """
    with alone(injection.model), injection.looking():
        module(*tree_map(_copied, args), **tree_map(_copied, kwargs))
    injection.learn()


def find_binarized_weights(
    model: nn.Module, *inputs: Tensor, weights: Weights | None = None, biases: bool = False
) -> dict[str, nn.Parameter]:
    """Return the binarized weights of any model, also of layers that nobody knows, by watching one forward.

    Float weights are left out; a float layer whose weights all have one magnitude, as some initializers make them,
    can't be told from a binary one before its first update.

    Args:
        model: any module; it runs once, in the mode it is in, without a trace.
        inputs: of the model.
        weights: patterns or a function; then only what they select.
        biases: report binary biases too.

    Example:
        >>> class Mine(nn.Linear):
        ...     def forward(self, x):
        ...         return nn.functional.linear(x, self.weight + (self.weight.sign() - self.weight).detach())
        >>> model = nn.Sequential(Mine(16, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> list(find_binarized_weights(model, torch.ones(1, 16)))
        ['0.weight']
    """
    binarized_weights(model, weights)  # raises for a pattern that matches nothing
    finder = Finder(model, weights, biases)
    with torch.enable_grad(), alone(model), finder:
        model(*inputs)
    for sentence in without_flips(finder):
        warnings.warn(f"find_binarized_weights: {sentence}", stacklevel=2)
    return {site.name: site.weight for site in finder.findings.sites()}
