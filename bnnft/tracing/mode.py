"""A torch function mode that is active wherever a model's modules run."""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from bnnft.tracing.compiled import uncompiled


class Hook:
    """A hook of a module. A copy of the module, or what is unpickled of it, has one that only takes itself away.

    Args:
        action: what it does in the module itself, given what torch hands to a hook.
    """

    left_alone = True  # it comes and goes with a context, also inside of what puts a model's attributes back

    def __init__(self, action: Callable[..., None] | None = None) -> None:
        self._action = action

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Act, or take itself away."""
        if self._action is not None:
            self._action(module, *args)
            return
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook is self]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
                module._forward_pre_hooks_with_kwargs.pop(key, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, ()


class ModuleMode(TorchFunctionMode):
    """Is active around the code in its context, and by hooks in the forwards of a model's modules in every thread.

    A subclass implements ``__torch_function__`` and runs what has a backward inside by :meth:`again`, so that it is
    active in what activation checkpointing recomputes. What is compiled runs as it was written.

    Args:
        model: any module. Scripted modules in it are left alone.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = 0  # of outermost modules, so far
        self.ran: set[str] = set()  # names of modules, since it was entered
        self._thread = threading.local()
        self._stack = ExitStack()

    def entered(self) -> None:
        """Do what a subclass does before the first operation."""

    def left(self) -> None:
        """Do what a subclass does after the last operation."""

    def __enter__(self) -> Self:
        self.ran = set()
        with torch._C.DisableTorchFunction():  # our own operations are nobody's business
            self.entered()
        for name, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # nobody sees what it does
            enter, leave = Hook(partial(self._enter_module, name)), Hook(partial(self._leave_module, name))
            self._stack.callback(module.register_forward_pre_hook(enter).remove)
            # always: an error in a forward must leave neither its name nor the mode behind
            self._stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        self._stack.enter_context(uncompiled())
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        others = []  # that were entered since, and are left later
        while self in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            if (top := _pop_mode()) is not self:  # type: ignore[no-untyped-call]
                others.append(top)
        for mode in reversed(others):
            _push_mode(mode)  # type: ignore[no-untyped-call]
        self._stack.close()
        self._within.clear()  # what an interrupt has left there
        with torch._C.DisableTorchFunction():
            self.left()

    @property
    def place(self) -> str:
        """The qualified name of the innermost module that runs now, empty outside of all."""
        return self._within[-1][0] if self._within else ""

    @property
    def in_forward(self) -> bool:
        """Whether a module's forward runs now."""
        return bool(self._within)

    @property
    def _within(self) -> list[tuple[str, bool]]:
        """The modules that run now in this thread, and whether their hooks have entered the mode."""
        within: list[tuple[str, bool]] = self._thread.__dict__.setdefault("within", [])
        return within

    def _enter_module(self, name: str, *args: Any) -> None:
        entered = self not in _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        self.forwards += not self._within
        self.ran.add(name)
        self._within.append((name, entered))
        if entered:
            super().__enter__()  # type: ignore[no-untyped-call]

    def _leave_module(self, name: str, *args: Any) -> None:
        if self.place == name and self._within and self._within.pop()[1]:  # not if another hook has failed before ours
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def again(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function while active, inside of what this mode handles."""
        super().__enter__()  # type: ignore[no-untyped-call]
        try:
            return function(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]
