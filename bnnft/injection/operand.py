"""Flip bits where they are made: in the tensors of two values that come of a parameter, in every use of them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnnft.injection.bits import Bits, Mark, owners_of
from bnnft.injection.exact_gradient import ExactGradient
from bnnft.injection.exchange import exchanged, exchanged_made
from bnnft.injection.finder import Finder
from bnnft.injection.sites import Weights
from bnnft.injection.zeros import PendingZeros
from bnnft.tracing.binary import TwoValues, differs_at_once, sides_of, two_values
from bnnft.tracing.elements import Elements
from bnnft.tracing.origins import Origin
from bnnft.tracing.steps import Step

# flat indices of a site's wrong bits, or what draws them once the bits are known: from a tensor of their signs
Drawn = Tensor | Callable[[Tensor], Tensor]


class OperandFlips(Finder):
    """Flips the bits of sites where they are made, while active; writes to no parameter.

    It also keeps looking: what it does not know yet is found in the forward in which it first runs.

    Args:
        model: the module that is to run.
        weights: patterns or a function; then only what they select is found.
        biases: find binary biases too.
        exact: let the gradient of a flipped bit change sign; else it passes as if nothing was flipped.

    Attributes:
        flips: for each site's name the flat indices of the bits that read wrong.
        elsewhere: names of sites that need no flips from here.
        draw: returns the flips of a parameter that is found while active, by name; without it that forward is clean.
    """

    def __init__(
        self, model: nn.Module, weights: Weights | None = None, biases: bool = False, exact: bool = False
    ) -> None:
        super().__init__(model, weights, biases)
        self.flips: Mapping[str, Drawn] = {}
        self.elsewhere: frozenset[str] = frozenset()
        self.draw: Callable[[str], Drawn | None] | None = None
        self._exact = ExactGradient(self.origins) if exact else None
        self._last: dict[str, Tensor] = {}  # flips that were made last
        self._found_in: dict[str, int] = {}  # the forward in which a parameter was found, by its number
        self._zeros = PendingZeros()

    def flipped(self, result: Tensor, elements: Elements, mark: Mark, found: TwoValues) -> Tensor:
        """Exchange the two values of what was just made at the drawn bits."""
        owners = [owner for owner in mark.owners if self._is_flipped(owner) and owner not in self.stored]
        bits = self.bits[mark]
        if not owners or bits.feeds is False or not (self.in_forward or bits.feeds):
            return result
        with torch._C.DisableTorchFunction():
            self._zeros.forget(mark)
            places = {owner: self._places(owner, result, elements, found) for owner in owners}
            bits_alone = [self._zeros.without(mark, result, elements, each, found.middle) for each in places.values()]
            if self._exact is not None:
                self.origins.view(result, elements)
                result = self._exact.made(result, {owner: self._last[owner] for owner in owners})
            for each in bits_alone:
                result = exchanged_made(result, each, found.middle)
            if bits.sides is not None and (self.proof is not None or bits.feeds is None):
                self.bits[mark] = bits._replace(sides=sides_of(result, found))
        return result

    def remade(self, result: Tensor, step: Step, elements: Elements, origin: Origin) -> tuple[Tensor, Any]:
        """Exchange what was made of zeros, which were no bits yet."""
        owners = owners_of(origin.marks)
        if self.proof is not None or not any(map(self._is_flipped, owners)):  # else sides are those of clean bits
            super().remade(result, step, elements, origin)
        if self._exact is not None and result.requires_grad:
            flips = {owner: self._last[owner] for owner in owners & self._last.keys()}
            result = self._exact.joined(result, step.given, flips)
        pending = self._zeros.behind(origin)
        found = two_values(result, one_is_enough=True) if pending else None
        if found is None:
            return result, None
        with torch._C.DisableTorchFunction():
            sides, bits = sides_of(result, found), self.bits[pending[0]]
            for mark in pending:
                zeros = self.origins.at(result, *self._zeros.of(mark))
                if zeros is None or bool((sides[zeros > 0] == 0).any()):
                    return result, None
                result = exchanged_made(result, zeros.reshape(-1).nonzero().squeeze(1), found.middle)
            mark = Mark(self.place, f"{step.operation} of zeros", tuple(result.shape), pending[0].owners)
            self.bits[mark] = Bits(found.symmetric, bits.feeds, sides_of(result, found), elements)
        return result, mark

    def read(self, parameter: str, values: Tensor, operation: str) -> Tensor:
        """Exchange the two values of a parameter that holds the bits itself, in what is read of it."""
        super().read(parameter, values, operation)
        if parameter not in self.stored or not self._is_flipped(parameter):
            return values
        if not self.in_forward or differs_at_once(values):
            return values
        elements, found = self.origins.elements(values), two_values(values)
        if elements is None or found is None:
            return values
        with torch._C.DisableTorchFunction():
            places = self._places(parameter, values, elements, found)
            result = exchanged(values, places, found.middle)
            self.origins.keep(result, Origin(frozenset([parameter]), frozenset([parameter])), elements)
        return result if self._exact is None else self._exact.made(result, {parameter: self._last[parameter]})

    def taken(self, operand: Tensor) -> Tensor:
        """Change the gradient's signs in what an autograd function has made of bits."""
        return operand if self._exact is None else self._exact.taken(operand)

    def used(self, operand: Tensor, operation: str, first: bool, origin: Origin) -> Tensor:
        """Look at what the batch is combined with; flip what was not known before, and change the gradient's signs."""
        uses, known = self.findings.uses, set(self.findings.uses)
        super().used(operand, operation, first, origin)
        for owner in set(uses) - known - set(self.flips) - self.elsewhere:
            if self.draw is not None and (flips := self.draw(owner)) is not None:
                self.flips = {**self.flips, owner: flips}
                self.stored |= {owner} if uses[owner].stored else set()
                self._found_in[owner] = self.forwards
        marked = owners_of(origin.marks)
        owners = marked | (origin.parameters & self.stored)
        if late := [owner for owner in owners if owner in self.flips and not self._is_flipped(owner)]:
            operand = self._flipped_late(operand, late)
        if self._exact is not None:
            self._exact.check(operand, marked & set(self.flips), self.place)
        return operand

    def signs(self, owner: str) -> Tensor:
        """Return the signs of a parameter with its flips."""
        signs = super().signs(owner).contiguous()
        if (flips := self._last.get(owner)) is not None:
            signs.view(-1)[flips] *= -1
        return signs

    def _is_flipped(self, owner: str) -> bool:
        """Return whether bits are flipped where they are made: not in the forward that finds their parameter."""
        return owner in self.flips and self._found_in.get(owner) != self.forwards

    def _flipped_late(self, operand: Tensor, owners: list[str]) -> Tensor:
        """Flip bits in an operand whose parameters were not known when they were made."""
        values, elements = two_values(operand, one_is_enough=True), self.origins.elements(operand)
        if values is not None and elements is not None:
            with torch._C.DisableTorchFunction():
                places = [self._places(owner, operand, elements, values) for owner in owners]
                if self._exact is not None:
                    operand = self._exact.made(operand, {owner: self._last[owner] for owner in owners})
                operand = operand if operand.requires_grad else operand.clone()  # it may be used once more
                for there in places:
                    operand = exchanged_made(operand, there, values.middle)
        return operand

    def _places(self, owner: str, values: Tensor, elements: Elements, found: TwoValues) -> Tensor:
        """Return the flat places of a parameter's wrong bits in a tensor that holds some or all of them."""
        flips = self.flips[owner]
        if not isinstance(flips, Tensor):
            bits = values.detach() - found.middle
            if owner in self.findings.uses and self.findings.uses[owner].zero < 0:
                bits = bits.where(bits != 0, -1)  # which it is to become
            flips = flips(self.origins.whole(owner, bits, elements))
        self._last[owner] = flips
        return elements.positions(self.origins, owner, flips, values.numel())

    def left(self) -> None:
        """Forget all tensors."""
        super().left()
        if self._exact is not None:
            self._exact.clear()
        self._last.clear()
        self._zeros.clear()
