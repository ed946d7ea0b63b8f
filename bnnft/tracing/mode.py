"""A torch function mode that is active wherever a model's modules run."""

import threading
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from bnnft.tracing.compiled import uncompiled


class ModuleMode(TorchFunctionMode):
    """Is active around the code in its context, and by hooks in the forwards of a model's modules in every thread.

    A subclass implements ``__torch_function__`` and runs what has a backward inside by :meth:`again`, so that it is
    active in what activation checkpointing recomputes. Compiled modules run uncompiled inside.

    Args:
        model: any module. Scripted modules in it are left alone.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._names: dict[int, str] = {}  # of modules, by their identities
        self._thread = threading.local()
        self._stack = ExitStack()

    def entered(self) -> None:
        """Do what a subclass does before the first operation."""

    def left(self) -> None:
        """Do what a subclass does after the last operation."""

    def __enter__(self) -> Self:
        modules = [pair for pair in self.model.named_modules() if not isinstance(pair[1], torch.jit.ScriptModule)]
        self._names = {id(module): name for name, module in modules}
        with torch._C.DisableTorchFunction():  # our own operations are nobody's business
            self.entered()
        # not in the modules: a copy of the model that is made now must not carry them
        self._stack.callback(register_module_forward_pre_hook(self._enter_module).remove)
        # always: an error in a forward must leave neither its name nor the mode behind
        self._stack.callback(register_module_forward_hook(self._leave_module, always_call=True).remove)
        self._stack.enter_context(uncompiled(self.model))
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

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        name = self._names.get(id(module))
        if name is None:
            return
        entered = self not in _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        self._within.append((name, entered))
        if entered:
            super().__enter__()  # type: ignore[no-untyped-call]

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._within and self._names.get(id(module)) == self.place and self._within.pop()[1]:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def again(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function while active, inside of what this mode handles."""
        super().__enter__()  # type: ignore[no-untyped-call]
        try:
            return function(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]
