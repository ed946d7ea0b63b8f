"""Say when a module is called, to contexts that come and go, without a trace in copies and in compiled graphs."""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from bnnft.injection.saves import clean_state
from bnnft.tracing.compiled import is_compiled_function


class Listener(Protocol):
    """Whoever wants to know when modules are called."""

    def before_call(self, module: nn.Module) -> None:
        """Do what is to be done before the module computes."""

    def after_call(self, module: nn.Module, output: Any) -> None:
        """Do what is to be done with what the module returns, ``None`` if it raises."""


_KEY = "bnnft"


class _Listened:
    """A module that somebody listens to.

    The hooks are plain functions, always under one key: copies and pickles of the module hold no more than their names,
    and a graph that was compiled with them does not have to be compiled anew for the next context, as it would be for
    the numbers that torch gives to hooks.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.listeners = module, list[Listener]()
        self.replaced: dict[str, Any] = {}  # compiled methods, of which no hook of a module tells

    def attach(self) -> None:
        """Hook on the module, and stand before its compiled methods."""
        module = self.module
        if getattr(module, "_compiled_call_impl", None) is None:  # else hooks would be part of the graph
            pairs: Any = ((module._forward_pre_hooks, _before), (module._forward_hooks, _after))
            for hooks, hook in pairs:
                hooks[_KEY] = hook
                hooks.move_to_end(_KEY, last=False)
            module._forward_hooks_always_called[_KEY] = True  # type: ignore[index]
        # of the class, since scripted modules refuse hooks, and run them all the same
        nn.Module.register_state_dict_post_hook(module, clean_state)  # type: ignore[no-untyped-call]
        for name, method in list(vars(module).items()):
            if name != "forward" and is_compiled_function(method):
                self.replaced[name] = method
                vars(module)[name] = _announced(module, method)

    def detach(self) -> None:
        """Leave the module as it was; more calls do nothing."""
        for name, method in self.replaced.items():
            vars(self.module)[name] = method
        _unhook(self.module)


_listened: dict[int, _Listened] = {}  # by the identity of the module


def listen(module: nn.Module, listener: Listener) -> None:
    """Let a listener know of all calls of a module, and keep the module's state dicts clean."""
    listened = _listened.get(id(module))
    if listened is None:
        listened = _listened[id(module)] = _Listened(module)
        listened.attach()
    listened.listeners.append(listener)


def unlisten(module: nn.Module, listener: Listener) -> None:
    """Say nothing more to a listener; the last one leaves the module as it was. More calls do nothing."""
    listened = _listened.get(id(module))
    if listened is not None:
        if listener in listened.listeners:
            listened.listeners.remove(listener)
        if not listened.listeners:
            listened.detach()
            del _listened[id(module)]


def _before(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    listened = _listened.get(id(module))
    if listened is None:
        _unhook(module)  # a copy of a module, made while somebody listened
        return
    for listener in tuple(listened.listeners):
        listener.before_call(module)


def _after(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    listened = _listened.get(id(module))
    for listener in () if listened is None else tuple(listened.listeners):
        listener.after_call(module, output)


def _announced(module: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def announced(*args: Any, **kwargs: Any) -> Any:
        _before(module, args)
        output = method(*args, **kwargs)
        _after(module, args, output)
        return output

    return announced


def _unhook(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks, module._state_dict_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_before, _after, clean_state)]:
            del hooks[key]
    module._forward_hooks_always_called.pop(_KEY, None)  # type: ignore[call-overload]
