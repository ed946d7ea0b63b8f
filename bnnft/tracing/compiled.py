"""Which parts of a model are compiled, and how to run them uncompiled for a while."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import getattr_static
from typing import Any

import torch
from torch import nn


def compiled_modules(model: nn.Module) -> set[str]:
    """Return the qualified names of the modules that run in a compiled graph, with all that is inside of them.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Linear(2, 2), backend="eager"))
        >>> sorted(compiled_modules(model))
        ['1', '1._orig_mod']
    """
    if "torch._dynamo" not in sys.modules:
        return set()  # nothing is compiled
    found = [name for name, module in model.named_modules() if _is_compiled(module)]
    values = [value for module in model.modules() for value in vars(module).values()]
    attributes = [value for value in values if isinstance(value, nn.Module) and hasattr(value, "_orig_mod")]
    inside = {id(module) for value in attributes for child in value.children() for module in child.modules()}
    found += [name for name, module in model.named_modules() if id(module) in inside]
    return {
        name
        for name, _ in model.named_modules()
        if any(not outer or name == outer or name.startswith(f"{outer}.") for outer in found)
    }


def _is_compiled(module: nn.Module) -> bool:
    compiled = getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules
    return compiled or any(is_compiled_function(value) for value in vars(module).values())


def is_compiled_function(value: object) -> bool:
    """Return whether a value is what ``torch.compile`` made of a function; foreign attributes are not asked."""
    return getattr_static(value, "_torchdynamo_orig_callable", None) is not None and not isinstance(value, nn.Module)


class _Eager:
    """Holds the compiler off while anybody asks for it: how torch compiles is a matter of the whole process.

    Without a lock, which an interrupt could leave closed.
    """

    def __init__(self) -> None:
        self._asking: set[object] = set()
        self._stance: Any = None

    def ask(self, who: object) -> None:
        self._asking.add(who)
        self._settle()

    def leave(self, who: object) -> None:
        """Take a request back, also one that an interrupt has cut short."""
        self._asking.discard(who)
        self._settle()

    def _settle(self) -> None:
        while bool(self._asking) != (self._stance is not None):  # others may ask in between
            if self._asking:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()
            else:
                self._stance.__exit__(None, None, None)
                self._stance = None


_EAGER = _Eager()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run what is compiled as it was written, as long as this lasts in any thread.

    The compiler can't see into modes that watch operations, and fails where one is active.
    """
    if "torch._dynamo" not in sys.modules:
        yield  # nothing is compiled; to import it takes seconds
        return
    who = object()
    try:
        _EAGER.ask(who)
        yield
    finally:
        _EAGER.leave(who)
