"""Which parts of a model are compiled, and how to run them uncompiled for a while."""

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


def compiled_modules(model: nn.Module) -> set[str]:
    """Return the qualified names of the modules that run in a compiled graph, with all that is inside of them.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Linear(2, 2), backend="eager"))
        >>> sorted(compiled_modules(model))
        ['1', '1._orig_mod']
    """
    found = [name for name, module in model.named_modules() if _is_compiled(module)]
    attributes = [value for module in model.modules() for value in vars(module).values() if hasattr(value, "_orig_mod")]
    inside = {id(module) for value in attributes for module in value._orig_mod.modules()}
    found += [name for name, module in model.named_modules() if id(module) in inside]
    return {
        name
        for name, _ in model.named_modules()
        if any(not outer or name == outer or name.startswith(f"{outer}.") for outer in found)
    }


def _is_compiled(module: nn.Module) -> bool:
    compiled = getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules
    functions = (value for value in vars(module).values() if not isinstance(value, nn.Module))
    return compiled or any(hasattr(function, "_torchdynamo_orig_callable") for function in functions)


class _Eager:
    """Holds the compiler off while anybody asks for it: how torch compiles is a matter of the whole process."""

    def __init__(self) -> None:
        self._lock, self._stance = threading.Lock(), ExitStack()
        self._asking: set[object] = set()

    def ask(self, who: object) -> None:
        with self._lock:
            if not self._asking:
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))
            self._asking.add(who)

    def leave(self, who: object) -> None:
        """Take a request back, also one that an interrupt has cut short."""
        with self._lock:
            self._asking.discard(who)
            if not self._asking:
                self._stance.close()


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
