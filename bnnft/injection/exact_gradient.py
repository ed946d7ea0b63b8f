"""Let the gradient of flipped bits change sign in every use, or say that it can't."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bnnft.injection.exchange import with_turned_gradient
from bnnft.tracing.elements import Elements, storage_of
from bnnft.tracing.origins import Origins


class ExactGradient:
    """Changes the sign of gradients at flipped bits, and checks that these reach their parameters.

    The sign changes in the first tensor of bits that is in autograd's graph: what is multiplied onto the bits later has
    the gradient of flipped ones.

    Args:
        origins: of the tensors that are made of parameters.
    """

    def __init__(self, origins: Origins) -> None:
        self._origins = origins
        self._made: dict[int, dict[str, Tensor]] = {}  # flips of what was made, by memory
        self._reached: set[str] = set()  # parameters whose gradients change sign
        self._hidden: dict[str, Any] = {}  # hooks on those that were used without a graph

    def made(self, bits: Tensor, flips: Mapping[str, Tensor]) -> Tensor:
        """Return bits that were just made, with another gradient.

        Args:
            bits: made of parameters.
            flips: flat indices of flipped bits, by parameter.
        """
        # an autograd function may be about to put them into the graph, or they were written over something in it
        self._made[storage_of(bits)] = dict(flips)
        return self._turned(bits, flips) if bits.requires_grad else bits

    def taken(self, bits: Tensor) -> Tensor:
        """Return what an operation takes of bits that came into the graph since they were made."""
        flips = self._made.get(storage_of(bits), {}) if bits.requires_grad else {}
        return self._turned(bits, {owner: each for owner, each in flips.items() if not _changes_sign(bits, owner)})

    def _turned(self, bits: Tensor, flips: Mapping[str, Tensor]) -> Tensor:
        elements = self._origins.elements(bits)
        if elements is None:
            return bits
        for owner, indices in flips.items():
            places = elements.positions(self._origins, owner, indices, bits.numel())
            bits = with_turned_gradient(bits, places, owner)
        return bits

    def joined(self, result: Tensor, given: Iterable[Tensor], flips: Mapping[str, Tensor]) -> Tensor:
        """Return bits without a graph that were put on top of their parameter, with another gradient."""
        elements = self._origins.elements(result)
        if not result.requires_grad or elements is None:
            return result
        own = [owner for owner in flips if any(self._passes(tensor, elements, owner) for tensor in given)]
        return self._turned(result, {owner: flips[owner] for owner in own if not _changes_sign(result, owner)})

    def _passes(self, tensor: Tensor, elements: Elements, owner: str) -> bool:
        """Return whether the gradient of a tensor goes on to a parameter, element by element, not by way of bits."""
        origin = self._origins.of(tensor)
        own = origin is not None and not origin.marks and owner in origin.parameters
        return own and tensor.requires_grad and self._origins.elements(tensor) == elements

    def check(self, operand: Tensor, owners: Iterable[str], place: str) -> None:
        """Look whether the gradient changes sign between a use of bits and their parameters.

        Args:
            operand: that the batch is combined with.
            owners: parameters with flips.
            place: the module that runs.

        Raises:
            RuntimeError: it does not.
        """
        for owner in owners:
            parameter = self._origins.parameters[owner]
            if torch.is_grad_enabled() and parameter.requires_grad:
                if not _changes_sign(operand, owner):
                    raise _out_of_reach(owner, place)
                self._reached.add(owner)
            elif parameter.requires_grad and not parameter.is_inference() and owner not in self._hidden:
                # activation checkpointing runs it again with a graph; an autograd function does not
                check = partial(self._check_reached, owner, place)
                self._hidden[owner] = parameter.register_hook(check)  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        """Forget all parameters."""
        for handle in self._hidden.values():
            handle.remove()
        self._hidden.clear()
        self._reached.clear()
        self._made.clear()

    def _check_reached(self, owner: str, place: str, gradient: Tensor) -> None:
        if owner not in self._reached:
            raise _out_of_reach(owner, place)


def _changes_sign(tensor: Tensor, owner: str) -> bool:
    """Return whether the gradient of a tensor changes sign at flips of a parameter on its way."""
    nodes, known = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in known:
            continue
        if getattr(node, "owner", None) == owner:
            return True
        known.add(node)
        nodes += [below for below, _ in node.next_functions]
    return False


def _out_of_reach(owner: str, place: str) -> RuntimeError:
    return RuntimeError(
        f"gradient='exact' can't reach the bits of {owner}, which {place or 'the model'} hides from autograd: "
        "use gradient='straight_through'"
    )
