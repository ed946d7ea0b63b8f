"""Which parts of a model are compiled, and how to run them uncompiled for a while."""

from contextlib import AbstractContextManager, nullcontext

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
    return compiled or any(hasattr(value, "_torchdynamo_orig_callable") for value in vars(module).values())


def uncompiled(model: nn.Module) -> AbstractContextManager[None]:
    """Run the compiled parts of a model as they were written; a model without any is left alone."""
    if not compiled_modules(model):
        return nullcontext()  # how torch compiles is a matter of the whole process: other threads may care
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance
