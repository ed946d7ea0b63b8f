"""Flip bits where they are made: in the tensors of two values that come of a parameter, in every use of them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bnnft.injection.bits import Bits, Mark
from bnnft.injection.finder import Finder
from bnnft.injection.signs import flip_signs
from bnnft.injection.sites import Weights
from bnnft.tracing.binary import TwoValues, differs_at_once, sides_of, two_values
from bnnft.tracing.elements import Elements
from bnnft.tracing.origins import Origin

# flat indices of a site's wrong bits, or what draws them once the bits are known: from a tensor of their signs
Drawn = Tensor | Callable[[Tensor], Tensor]


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
    def forward(ctx: Any, values: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (places,) = ctx.saved_tensors
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        return exchange(gradient, places, gradient.new_zeros(())), None


def exchange(values: Tensor, places: Tensor, middle: Tensor) -> Tensor:
    """Exchange two values in place at flat places, given what is in their middle, and return them."""
    if middle.dim() == 0 and not middle.any():
        flip_signs(values, places)
    else:
        middles = middle.expand_as(values).take(places)
        values.put_(places, 2 * middles - values.take(places))
    return values


def exchanged(values: Tensor, places: Tensor, middle: Tensor, exact: bool = False) -> Tensor:
    """Return two values exchanged at flat places, given what is in their middle; the gradient passes, or is turned."""
    if exact:
        values = _TurnGradient.apply(values, places)
    result: Tensor = _Exchange.apply(values, places, middle)
    return result


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
        draw: returns the flips of a parameter that is found while active, by its name; without it the forward in which
            that is stays clean.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Weights | None = None,
        biases: bool = False,
        exact: bool = False,
    ) -> None:
        super().__init__(model, weights, biases)
        self.flips: Mapping[str, Drawn] = {}
        self.elsewhere: frozenset[str] = frozenset()
        self.draw: Callable[[str], Drawn | None] | None = None
        self._exact = exact
        self._last: dict[str, Tensor] = {}  # flips that were made last
        self._reached: set[str] = set()  # whose gradients change sign
        self._found_in: dict[str, int] = {}  # the forward in which a parameter was found, by its number
        self._zeros: dict[Mark, tuple[Tensor, Elements]] = {}  # int8, flips that wait for zeros to become bits
        self._hidden: dict[str, Any] = {}  # hooks on those that were used without a graph

    def flipped(self, result: Tensor, elements: Elements, mark: Mark, found: TwoValues) -> Tensor:
        """Exchange the two values of what was just made at the drawn bits."""
        owners = [owner for owner in mark.owners if self._is_flipped(owner) and owner not in self.stored]
        bits = self.bits[mark]
        if not owners or bits.feeds is False or not (self.in_forward or bits.feeds):
            return result
        with torch._C.DisableTorchFunction():
            self._zeros.pop(mark, None)
            for owner in owners:
                places = self._places(owner, result, elements, found)
                places = self._without_zeros(mark, result, elements, places, found.middle)
                result = self._exchanged(result, places, found.middle)
            if bits.sides is not None and (self.proof is not None or bits.feeds is None):
                self.bits[mark] = bits._replace(sides=sides_of(result, found))
        return result

    def remade(self, result: Tensor, operation: str, elements: Elements, origin: Origin) -> tuple[Tensor, Any]:
        """Exchange what was made of zeros, which were no bits yet."""
        pending = [mark for mark in origin.marks if mark in self._zeros]
        found = two_values(result, one_is_enough=True) if pending else None
        if found is None:
            return result, None
        with torch._C.DisableTorchFunction():
            sides, bits = sides_of(result, found), self.bits[pending[0]]
            for mark in pending:
                zeros = self.at(result, *self._zeros[mark])
                if zeros is None or bool((sides[zeros > 0] == 0).any()):
                    return result, None
                result = self._exchanged(result, zeros.reshape(-1).nonzero().squeeze(1), found.middle)
            mark = Mark(self.place, f"{operation} of zeros", tuple(result.shape), pending[0].owners)
            self.bits[mark] = Bits(found.symmetric, bits.feeds, sides_of(result, found), elements)
        return result, mark

    def _without_zeros(self, mark: Mark, values: Tensor, elements: Elements, places: Tensor, middle: Tensor) -> Tensor:
        """Return the places of bits: what ``torch.sign`` makes of 0 is none before something fills it."""
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return places
        there = values.detach().reshape(-1).index_select(0, places)
        if middle.dim():
            there = there - middle.expand_as(values).take(places)
        if bool(there.all()):
            return places
        none = torch.zeros(values.shape, dtype=torch.int8, device=values.device)
        zeros, _ = self._zeros.setdefault(mark, (none, elements))
        zeros.view(-1)[places[there == 0]] = 1
        return places[there != 0]

    def read(self, parameter: str, values: Tensor, operation: str) -> Tensor:
        """Exchange the two values of a parameter that holds the bits itself, in what is read of it."""
        if parameter not in self.stored or not self._is_flipped(parameter):
            return values
        if not self.in_forward or differs_at_once(values):
            return values
        elements, found = self.origins.elements(values), two_values(values)
        if elements is None or found is None:
            return values
        with torch._C.DisableTorchFunction():
            places = self._places(parameter, values, elements, found)
            result: Tensor = _Exchange.apply(values, places, found.middle)
            self.origins.keep(result, Origin(frozenset([parameter]), frozenset([parameter])), elements)
        return self._with_gradient(result, places) if self._exact else result

    def used(self, operand: Tensor, operation: str, first: bool, origin: Origin) -> Tensor:
        """Look at what the batch is combined with; flip what was not known before, and change the gradient's signs."""
        known = set(self.uses)
        super().used(operand, operation, first, origin)
        for owner in set(self.uses) - known - set(self.flips) - self.elsewhere:
            if self.draw is not None and (flips := self.draw(owner)) is not None:
                self.flips = {**self.flips, owner: flips}
                self.stored |= {owner} if self.uses[owner].stored else set()
                self._found_in[owner] = self.forwards
        owners = {owner for mark in origin.marks for owner in mark.owners} | (origin.parameters & self.stored)
        if late := [owner for owner in owners if owner in self.flips and not self._is_flipped(owner)]:
            operand = self._flipped_late(operand, late)
        elif self._exact and origin.marks:
            operand = self._turned_gradient(operand, origin)
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
                operand = operand if operand.requires_grad else operand.clone()  # it may be used once more
                for owner in owners:
                    operand = self._exchanged(operand, self._places(owner, operand, elements, values), values.middle)
        return operand

    def _places(self, owner: str, values: Tensor, elements: Elements, found: TwoValues) -> Tensor:
        """Return the flat places of a parameter's wrong bits in a tensor that holds some or all of them."""
        flips = self.flips[owner]
        if not isinstance(flips, Tensor):
            bits = values.detach() - found.middle
            if owner in self.uses and self.uses[owner].zero < 0:
                bits = bits.where(bits != 0, -1)  # which it is to become
            flips = flips(self._whole(owner, bits, elements))
        self._last[owner] = flips
        return elements.positions(self.origins, owner, flips, values.numel())

    def _whole(self, owner: str, bits: Tensor, elements: Elements) -> Tensor:
        """Return the bits of a parameter, by their signs, in its own order; 1 where a tensor does not hold them."""
        parameter = self.origins.parameters[owner]
        if elements == Elements(owner) and bits.numel() == parameter.numel():
            return bits.reshape(parameter.shape)
        whole = bits.new_ones(
            sum(each.numel() for each in self.origins.parameters.values()) + 1
        )  # the last of constants
        whole[elements.places(self.origins, bits.shape, bits.device).reshape(-1)] = bits.reshape(-1)
        first = int(Elements(owner).places(self.origins, torch.Size([1]), bits.device))
        return whole[first : first + parameter.numel()].view(parameter.shape)

    @staticmethod
    def _exchanged(values: Tensor, places: Tensor, middle: Tensor) -> Tensor:
        if not places.numel():
            return values
        if torch._C._functorch.peek_interpreter_stack() is not None:  # in torch.vmap, say
            with torch.no_grad():
                return exchange(values, places, middle)
        if values.requires_grad:
            exchanged: Tensor = _Exchange.apply(values, places, middle)
            return exchanged
        return exchange(values.clone() if values.is_inference() else values, places, middle)

    def _turned_gradient(self, operand: Tensor, origin: Origin) -> Tensor:
        elements = self.origins.elements(operand)
        for owner in {owner for mark in origin.marks for owner in mark.owners} & set(self.flips):
            flips, parameter = self._last.get(owner), self.origins.parameters[owner]
            if torch.is_grad_enabled() and parameter.requires_grad:
                if not operand.requires_grad or elements is None or flips is None:
                    raise self._out_of_reach(owner)
                self._reached.add(owner)
                operand = self._with_gradient(operand, elements.positions(self.origins, owner, flips, operand.numel()))
            elif parameter.requires_grad and not parameter.is_inference() and owner not in self._hidden:
                # activation checkpointing runs it again with a graph; an autograd function does not
                self._hidden[owner] = parameter.register_hook(partial(self._check_reached, owner))  # type: ignore[no-untyped-call]
        return operand

    def _check_reached(self, owner: str, gradient: Tensor) -> None:
        if owner not in self._reached:
            raise self._out_of_reach(owner)

    def _out_of_reach(self, owner: str) -> RuntimeError:
        return RuntimeError(
            f"gradient='exact' can't reach the bits of {owner}, which {self.place or 'the model'} hides from autograd: "
            "use gradient='straight_through'"
        )

    def left(self) -> None:
        """Forget all tensors."""
        super().left()
        for handle in self._hidden.values():
            handle.remove()
        self._hidden.clear()
        self._reached.clear()
        self._last.clear()
        self._zeros.clear()

    @staticmethod
    def _with_gradient(operand: Tensor, places: Tensor) -> Tensor:
        result: Tensor = _TurnGradient.apply(operand, places)
        return result
