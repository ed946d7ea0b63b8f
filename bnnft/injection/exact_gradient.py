"""Let the gradient of flipped bits change sign in every use, or say that it can't."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bnnft.injection.exchange import with_turned_gradient
from bnnft.tracing.origins import Origins


class ExactGradient:
    """Changes the sign of gradients at flipped bits, where the batch is combined with them.

    Args:
        origins: of the tensors that are made of parameters.
    """

    def __init__(self, origins: Origins) -> None:
        self._origins = origins
        self._reached: set[str] = set()  # parameters whose gradients change sign
        self._hidden: dict[str, Any] = {}  # hooks on those that were used without a graph

    def turned(self, operand: Tensor, flips: Mapping[str, Tensor | None], place: str) -> Tensor:
        """Return an operand whose gradient changes sign at flipped bits.

        Args:
            operand: made of the bits of some parameters.
            flips: flat indices of flipped bits, by parameter.
            place: the module that runs.

        Raises:
            RuntimeError: autograd does not see them.
        """
        elements = self._origins.elements(operand)
        for owner, places in flips.items():
            parameter = self._origins.parameters[owner]
            if torch.is_grad_enabled() and parameter.requires_grad:
                if not operand.requires_grad or elements is None or places is None:
                    raise _out_of_reach(owner, place)
                self._reached.add(owner)
                there = elements.positions(self._origins, owner, places, operand.numel())
                operand = with_turned_gradient(operand, there)
            elif parameter.requires_grad and not parameter.is_inference() and owner not in self._hidden:
                # activation checkpointing runs it again with a graph; an autograd function does not
                check = partial(self._check_reached, owner, place)
                self._hidden[owner] = parameter.register_hook(check)  # type: ignore[no-untyped-call]
        return operand

    def clear(self) -> None:
        """Forget all parameters."""
        for handle in self._hidden.values():
            handle.remove()
        self._hidden.clear()
        self._reached.clear()

    def _check_reached(self, owner: str, place: str, gradient: Tensor) -> None:
        if owner not in self._reached:
            raise _out_of_reach(owner, place)


def _out_of_reach(owner: str, place: str) -> RuntimeError:
    return RuntimeError(
        f"gradient='exact' can't reach the bits of {owner}, which {place or 'the model'} hides from autograd: "
        "use gradient='straight_through'"
    )
