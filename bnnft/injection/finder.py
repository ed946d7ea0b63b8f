"""Find the binarized weights of any model by watching what it computes.

A float tensor of two values that is made of a parameter alone holds bits, if the batch is combined with it or with what
is made of it. Its owner is the parameter whose elements it was made of. No class names, no counts of operations.
"""

from typing import Any

import torch
from torch import Tensor, nn

from bnnft.injection.bits import (
    Bits,
    Mark,
    Use,
    by_signs,
    compared_with_latent,
    few_values,
    form_of,
    has_rank_one,
    is_masked,
    owners_of,
)
from bnnft.injection.proof import Proof
from bnnft.injection.sites import Site, Weights, first_names, known_sites
from bnnft.tracing.binary import TwoValues, differs_at_once, same_sides, sides_of, two_values
from bnnft.tracing.elements import Elements
from bnnft.tracing.origins import Origin
from bnnft.tracing.provenance import Provenance
from bnnft.tracing.sharding import whole
from bnnft.tracing.steps import Step
from bnnft.tracing.tracking import LINEAR_MAPS

_LEVELS = 16  # values of a weight that is made of several bits, at most


class Finder(Provenance):
    """Looks for binary weights while active; changes nothing.

    Args:
        model: the module that is to run.
        weights: patterns or a function; then only what they select counts.
        biases: take binary parameters of one dimension too.

    Attributes:
        uses: of binary parameters, by name.
        floats: names of parameters whose values were combined with the batch as floats.
        strangers: binary operands without a single owner: module and shape.
        stored: names of sites that hold the bits themselves.
        several: names of parameters of which more than one bit is made for an element, one after the other.
        reads: names of parameters that an operation has read.
        followed: names of parameters that were seen to be combined with the batch.
        proof: that is shown each use of bits, while a batch is watched.
    """

    def __init__(self, model: nn.Module, weights: Weights | None = None, biases: bool = False) -> None:
        super().__init__(model)
        self._weights, self._biases = weights, biases
        self.bits: dict[Mark, Bits] = {}
        self.uses: dict[str, Use] = {}
        self.floats: set[str] = set()
        self.strangers: dict[tuple[str, tuple[int, ...]], None] = {}
        self.stored: frozenset[str] = frozenset()
        self.several: set[str] = set()
        self.reads: set[str] = set()
        self.followed: set[str] = set()
        self.proof: Proof | None = None

    # --- what was found ---------------------------------------------------------------------------------------

    def sites(self) -> list[Site]:
        """Return the sites of the model: known and named ones, and what else it computed with in binary."""
        first = first_names(self.model)
        chosen = {first[site.name]: site for site in known_sites(self.model, self._weights)}
        found = []
        for position, (name, weight) in enumerate(self.model.named_parameters()):
            use, site = self.uses.get(name), chosen.get(name)
            counts = (weight.dim() > 1 or self._biases) and name not in self.several
            if site is None and use is not None and self._weights is None and counts:
                site = Site(name, weight, position)
            if site is not None:
                found.append(site if use is None else _as_used(site, use, name in self.floats))
        return found

    @property
    def is_selective(self) -> bool:
        """Whether only what a user has selected counts."""
        return self._weights is not None

    def biases_left(self) -> list[str]:
        """Return the names of binary parameters of one dimension that do not count as sites."""
        if self._biases or self.is_selective:
            return []
        return [name for name in self.uses if self.origins.parameters[name].dim() < 2]

    def settle(self) -> None:
        """Take what else was made of a parameter in use for bits, if it has the same sides."""
        for mark, bits in self.bits.items():
            feeding = [b.sides for m, b in self.bits.items() if b.feeds and m.owners == mark.owners]
            known = [sides for sides in feeding if sides is not None]
            if bits.feeds is None and bits.sides is not None and known:
                same = any(sides.shape == bits.sides.shape and same_sides(sides, bits.sides) for sides in known)
                self.bits[mark] = bits._replace(feeds=same)
        self.bits = {mark: bits._replace(sides=None, elements=None) for mark, bits in self.bits.items()}

    # --- watching ---------------------------------------------------------------------------------------------

    def made(self, result: Tensor, step: Step, elements: Elements, origin: Origin) -> tuple[Tensor, Any]:
        """Look at a float tensor that was made of parameters, element by element."""
        if origin.marks:
            return self.remade(result, step, elements, origin)
        if result.numel() < 2 or differs_at_once(result):
            return result, None
        mark = Mark(self.place, step.operation, tuple(result.shape), tuple(elements.owners(self.origins)))
        known = self.bits.get(mark)
        settled = known is not None and known.symmetric and known.feeds is not None and known.sides is None
        if settled and self.proof is None:
            return self.flipped(result, elements, mark, TwoValues(torch.zeros(()), result, True)), mark
        found = two_values(result, one_is_enough=True)
        if found is None:
            return result, None
        feeds = None if known is None else known.feeds
        self.bits[mark] = Bits(found.symmetric, feeds, sides_of(result, found), elements)
        result = self.flipped(result, elements, mark, found)
        return result, mark

    def remade(self, result: Tensor, step: Step, elements: Elements, origin: Origin) -> tuple[Tensor, Any]:
        """Return what is to be used in place of a tensor that was made of bits, and a mark if it is to have its own."""
        watched = [self.bits[mark] for mark in origin.marks if mark in self.bits and self.bits[mark].sides is not None]
        owners = owners_of(origin.marks) & origin.floats
        found = two_values(result) if watched and owners and not any(map(two_values, self._marked(step))) else None
        if found is not None and not any(self._shows(result, found, bits) for bits in watched):
            self.several |= owners
        return result, None

    def _marked(self, step: Step) -> list[Tensor]:
        """Return what an operation is given of bits."""
        pairs = zip(step.given, step.origins, strict=True)
        return [tensor for tensor, origin in pairs if origin is not None and origin.marks]

    def read(self, parameter: str, values: Tensor, operation: str) -> Tensor:
        """Take note of a parameter that an operation of the model reads."""
        if self.in_forward:
            self.reads.add(parameter)
        return values

    def flipped(self, result: Tensor, elements: Elements, mark: Mark, found: TwoValues) -> Tensor:
        """Return what is to be used in place of a tensor that holds bits."""
        return result

    def used(self, operand: Tensor, operation: str, first: bool, origin: Origin) -> Tensor:
        """Look at what the batch is combined with."""
        self.followed |= origin.parameters
        if origin.marks:
            self._use_of_bits(operand, operation, first, origin)
        elif operand.dim() < 2 and not self._biases:
            self.floats |= origin.parameters
        elif not self.in_forward and not operation.startswith(LINEAR_MAPS):
            pass  # an average that is kept of the weights, say
        elif differs_at_once(operand) or (found := two_values(operand)) is None:
            self.floats |= origin.parameters
        elif (owner := self.origins.owner(operand) or self._stored(origin)) is not None:
            if not found.symmetric and not self.is_selective and owner not in self.stored:
                if operand.dim() > 1:
                    self.not_float(operand)  # 0 and 1, as of an identity or a mask
                return operand
            self._add(owner, operand, operation, first, found, stored=True)
            if self.proof is not None:
                self.proof.check(self, owner, operand, found, None)
        elif operation.startswith(LINEAR_MAPS) and (origin.parameters or found.symmetric):
            self.not_float(operand)
        return operand

    def not_float(self, operand: Tensor) -> None:
        """Take note of bits that are no floats, in which nothing is flipped."""
        # what a backward multiplies gradients with is no weight, and what is computed around a model is not of it
        if self.in_forward and torch._C._current_graph_task_id() == -1:
            self.strangers[self.place, tuple(operand.shape)] = None

    def _stored(self, origin: Origin) -> str | None:
        """Return the site that an operand without marks was read from, if it holds the bits itself."""
        return next(iter(origin.parameters & self.stored), None) if len(origin.parameters) == 1 else None

    def _use_of_bits(self, operand: Tensor, operation: str, first: bool, origin: Origin) -> None:
        marks = [mark for mark in origin.marks if mark in self.bits]
        settled = all(self.bits[mark].feeds is not None and self.bits[mark].sides is None for mark in marks)
        if settled and self.proof is None:
            return
        found = two_values(operand, one_is_enough=True) or self._scaled(operand, marks, origin)
        most = 2 ** len(marks) if self._weights is None else _LEVELS
        if found is None and origin.floats and not few_values(operand, most):
            self.floats |= origin.floats
            # sums with bits of what other bits have left, and signs that floats of the same parameter scale
            if few_values(operand, _LEVELS) or self._have_signs(operand, marks):
                self.not_float(operand)
            return
        shown = [mark for mark in marks if found is not None and self._shows(operand, found, self.bits[mark])]
        for mark in shown or marks:
            self.bits[mark] = self.bits[mark]._replace(feeds=True)
            for owner in mark.owners:
                self._add(owner, operand, operation, first, found, stored=False)
                if self.proof is not None:
                    self.proof.check(self, owner, operand, found, self.bits[mark])

    def _shows(self, operand: Tensor, found: TwoValues, bits: Bits) -> bool:
        """Return whether an operand has the sides of a tensor of bits, up to the sign of a scale."""
        expected = None if bits.sides is None else self.origins.at(operand, bits.sides, bits.elements)
        return expected is not None and same_sides(sides_of(operand, found), expected)

    def _scaled(self, operand: Tensor, marks: list[Mark], origin: Origin) -> TwoValues | None:
        """Return the values of bits with scales of any shape, unless floats of the same parameter may be in them."""
        found = by_signs(operand)
        alone = owners_of(marks).isdisjoint(origin.floats) or has_rank_one(found.half) or is_masked(found.half)
        return found if alone and self._have_signs(operand, marks) else None

    def _have_signs(self, operand: Tensor, marks: list[Mark]) -> bool:
        """Return whether the signs of an operand are those of bits."""
        bits = [self.bits[mark] for mark in marks if self.bits[mark].symmetric]
        return any(self._shows(operand, by_signs(operand), each) for each in bits)

    def _add(
        self, owner: str, operand: Tensor, operation: str, first: bool, found: TwoValues | None, stored: bool
    ) -> None:
        """Take note of the first use of a parameter's bits, and of whether all are like the latent's signs."""
        like, zero = compared_with_latent(self.origins, owner, operand, found, self.signs(owner))
        if owner in self.uses:
            self.uses[owner] = self.uses[owner]._replace(like_latent=self.uses[owner].like_latent and like)
        else:
            fan_in, scale = form_of(operand, operation, first, found)
            self.uses[owner] = Use(self.place, fan_in, scale, stored, like, zero, owner in self.origins.written)

    def signs(self, owner: str) -> Tensor:
        """Return the signs of a parameter, int8, as its bits are to be if they are like them."""
        return whole(self.origins.parameters[owner]).sign().to(torch.int8)


def _as_used(site: Site, use: Use, is_float: bool) -> Site:
    """Return a site with what was seen of its use; of a known layer it is known how the bits are made."""
    where = "stored" if use.stored and not site.known else site.where
    like, zero = (site.known or use.like_latent) and not is_float, site.zero if site.known else use.zero
    site = site._replace(where=where, zero=zero, like_latent=like)
    return site._replace(layer=use.layer, fan_in=use.fan_in, scale=use.scale)
