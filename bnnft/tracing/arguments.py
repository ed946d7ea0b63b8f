"""The tensors among the arguments and results of operations."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def tensors_in(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among arguments, and in the lists and dicts among them.

    Example:
        >>> [tensor.item() for tensor in tensors_in([torch.tensor(1), [torch.tensor(2)], {"a": torch.tensor(3)}, "b"])]
        [1, 2, 3]
    """
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from tensors_in(argument)
        elif isinstance(argument, dict):
            yield from tensors_in(argument.values())


def replaced(arguments: Any, changes: Mapping[int, Tensor]) -> Any:
    """Return arguments in which tensors are replaced, given by their identities."""
    if isinstance(arguments, Tensor):
        return changes.get(id(arguments), arguments)
    if type(arguments) in (list, tuple):
        return type(arguments)(replaced(argument, changes) for argument in arguments)
    if isinstance(arguments, tuple) and hasattr(arguments, "_fields"):
        return type(arguments)(*(replaced(argument, changes) for argument in arguments))
    if isinstance(arguments, dict):
        return {name: replaced(argument, changes) for name, argument in arguments.items()}
    return arguments


def unwrapped(tensor: Tensor) -> Tensor:
    """Return what a function transform like ``torch.vmap`` has wrapped."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def write_over(target: Tensor, values: Tensor) -> Tensor:
    """Write values into a tensor behind autograd's back, so that its gradient passes as if they were its own."""
    if values is not target:
        with torch.no_grad():
            target.copy_(values)
    return target
