"""Exchange the two values of tensors at some places, with or without the gradient's sign."""

from typing import Any

import torch
from torch import Tensor

from bnnft.injection.signs import flip_signs
from bnnft.nn.binarize import opposite


class _Exchange(torch.autograd.Function):
    """The other of two values at some places; the gradient passes as if nothing was exchanged."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, middle: Tensor) -> Tensor:
        return exchange(values.clone(), places, middle)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return gradients[0], None, None


class _TurnGradient(torch.autograd.Function):
    """The identity, through which the gradient at some places changes sign."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, owner: str) -> Tensor:
        ctx.save_for_backward(places)
        ctx.owner = owner
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return opposite(gradients[0], *ctx.saved_tensors), None, None


def exchange(values: Tensor, places: Tensor, middle: Tensor) -> Tensor:
    """Exchange two values in place at flat places, given what is in their middle, and return them."""
    if middle.dim() == 0 and not middle.any():
        flip_signs(values, places)
    else:
        middles = middle.expand_as(values).take(places)
        values.put_(places, 2 * middles - values.take(places))
    return values


def with_turned_gradient(values: Tensor, places: Tensor, owner: str = "") -> Tensor:
    """Return the values; their gradient changes sign at flat places, of flips of a parameter."""
    result: Tensor = _TurnGradient.apply(values, places, owner)
    return result


def exchanged(values: Tensor, places: Tensor, middle: Tensor, exact: bool = False) -> Tensor:
    """Return two values exchanged at flat places, given what is in their middle; the gradient passes, or is turned."""
    result: Tensor = _Exchange.apply(with_turned_gradient(values, places) if exact else values, places, middle)
    return result


def exchanged_made(values: Tensor, places: Tensor, middle: Tensor) -> Tensor:
    """Return two values that were just made, exchanged at flat places: in place, where they are nobody's yet."""
    if not places.numel():
        return values
    if torch._C._functorch.peek_interpreter_stack() is not None:  # in torch.vmap, say
        with torch.no_grad():
            return exchange(values, places, middle)
    if values.requires_grad:
        return exchanged(values, places, middle)
    return exchange(values.clone() if values.is_inference() else values, places, middle)
