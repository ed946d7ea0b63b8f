"""Turn bits where they are used: in the operand of a linear map or convolution, not in the latent weight."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bnnft.injection.operands import Operand, OperandTracking, middles

# flat indices of a parameter's wrong bits, or what draws them once the bits are known: from a tensor of their signs
Flips = Tensor | Callable[[Tensor], Tensor]


class OperandFlips(OperandTracking):
    """Exchanges the two values of binary operands at the drawn bits, while active.

    Exact for any binarizer, also where the sign of the latent weight is not the bit: centred, two-valued, stochastic.
    It writes to no parameter, so there is nothing to restore.

    Args:
        model: the module that is to run.
        flips: where the operands are, from :class:`bnnft.injection.operands.OperandWatch`, each with its parameter's
            wrong bits.
        exact: let the gradient of a turned value change sign; else it passes as if nothing was turned.
    """

    def __init__(self, model: nn.Module, flips: Sequence[tuple[Operand, Flips]], exact: bool = False) -> None:
        super().__init__(model)
        self._places = {(operand.module, operand.number): (operand, indices) for operand, indices in flips}
        self._exact = exact

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the operation on turned operands."""
        turned = {}
        for place, tensor in self.placed(func, args, kwargs):
            if place in self._places:
                turned[id(tensor)] = self._turn(tensor, *self._places[place])
        if turned:
            args, kwargs = tree_map_only(Tensor, lambda tensor: turned.get(id(tensor), tensor), (args, kwargs))
        return func(*args, **kwargs)

    def _turn(self, values: Tensor, operand: Operand, flips: Flips) -> Tensor:
        middle = middles(values.detach(), operand.symmetric)
        if not isinstance(flips, Tensor):
            bits = values.detach() - middle
            flips = flips(bits.t() if operand.transposed else bits)
        if operand.transposed:
            columns, rows = values.shape
            flips = flips % columns * rows + flips.div(columns, rounding_mode="floor")
        return exchanged(values, flips, middle, self._exact)


def exchanged(values: Tensor, indices: Tensor, middle: Tensor, exact: bool = False) -> Tensor:
    """Return two-valued numbers with the two values exchanged at flat indices.

    Args:
        values: any shape.
        indices: flat, distinct.
        middle: between the two values, from :func:`bnnft.injection.operands.middles`.
        exact: let the gradient of an exchanged value change sign; else it passes as if nothing was exchanged.
    """
    twice = (2 * middle).expand_as(values).reshape(-1)[indices]
    if exact:
        signs, shift = torch.ones(values.numel()).to(values), torch.zeros(values.numel()).to(values)
        signs[indices], shift[indices] = -1, twice
        return values * signs.view_as(values) + shift.view_as(values)
    change = torch.zeros(values.numel()).to(values.detach())
    change[indices] = twice - 2 * values.detach().reshape(-1)[indices]
    return values + change.view_as(values)
