"""What torch's operations do, by their names, and how to run a backward under a mode."""

from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

# operations that move values and change none
REARRANGING = {"t", "transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "adjoint", "get"}
REARRANGING |= {"view", "reshape", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "contiguous", "clone"}
REARRANGING |= {"chunk", "split", "split_with_sizes", "tensor_split", "unbind", "narrow", "select", "getitem", "iter"}
REARRANGING |= {"hsplit", "vsplit", "dsplit", "diagonal", "as_strided", "detach", "alias", "expand", "roll", "flip"}
REARRANGING |= {"tile", "repeat", "rot90"}
REARRANGING |= {"index_select", "gather", "take", "repeat_interleave", "broadcast_to", "unfold", "requires_grad"}
REARRANGING |= {"view_as", "reshape_as", "expand_as"}
# those of them that put several tensors together
JOINING = {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack", "row_stack"}
REARRANGING |= JOINING
# those of them that keep the order of the elements
SAME_ORDER = {"view", "reshape", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "contiguous", "clone", "get"}
SAME_ORDER |= {"detach", "alias", "requires_grad", "view_as", "reshape_as"}

# operations whose results have the form of a tensor, but not its values
FORMS = {"zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like"}
FORMS |= {"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"}
# operations that give a tensor the form of another one
GIVES_FORM = {"type_as", "view_as", "expand_as", "reshape_as"}
# operations on a tensor's place in autograd's graph, and attributes
OF_AUTOGRAD = {"register_hook", "register_post_accumulate_grad_hook", "requires_grad", "retain_grad", "backward"}
OF_AUTOGRAD |= {"get", "set"}
# how operations begin that draw random numbers
_DRAWING = ("rand", "normal", "bernoulli", "multinomial", "poisson", "uniform", "exponential")
# operations that bring in data
_BRINGING = {"tensor", "as_tensor", "asarray", "from_numpy", "frombuffer", "new_tensor"}
_LITERAL = 64  # elements


def draws(name: str) -> bool:
    """Return whether an operation of this name draws random numbers."""
    return name.startswith(_DRAWING)


def brings(name: str, result: Any) -> bool:
    """Return whether an operation of this name has brought in data that is too large to be written in the code."""
    return name in _BRINGING and not (isinstance(result, Tensor) and result.numel() <= _LITERAL)


def writes(name: str) -> bool:
    """Return whether an operation of this name writes to its first operand.

    Example:
        >>> [writes(name) for name in ("add_", "__setitem__", "__iadd__", "add", "__add__", "__index__")]
        [True, True, True, False, False, False]
    """
    special = name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    return special or name.startswith(("__setitem", "__set__")) or (name.endswith("_") and not name.endswith("__"))


def _without_modes(function: Any) -> Any:
    """Return a function of torch that does not ask modes what to do: it would never run under one that is active."""
    names = function.__globals__ | {"has_torch_function": lambda tensors: False}
    copied = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


_BACKWARDS = {function: _without_modes(function) for function in (torch.autograd.backward, torch.autograd.grad)}


def backward_of(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what runs a backward under the modes that are active then, if a function with such arguments is one."""
    if function is Tensor.backward:
        kwargs = dict(kwargs)
        function, args = torch.autograd.backward, (args[0], kwargs.pop("gradient", None), *args[1:])
    return partial(_BACKWARDS[function], *args, **kwargs) if function in _BACKWARDS else None
