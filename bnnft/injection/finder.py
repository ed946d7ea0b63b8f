"""Find the binarized weights of any model by watching what it computes.

A float tensor of two values that is made of a parameter alone holds bits, if the batch is combined with it or with what
is made of it. Its owner is the parameter whose elements it was made of. No class names, no counts of operations.
"""

from typing import Any

import torch
from torch import Tensor, nn

from bnnft.injection.bits import Bits, Mark, Use, compared_with_latent, few_values, form_of, owners_of
from bnnft.injection.findings import Findings
from bnnft.injection.made_bits import MadeBits
from bnnft.injection.proof import Proof
from bnnft.injection.sites import Weights
from bnnft.tracing.binary import TwoValues, differs_at_once, sides_of, two_values
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
        findings: what was seen so far.
        bits: that were made of parameters, by their marks.
        stored: names of sites that hold the bits themselves.
        proof: that is shown each use of bits, while a batch is watched.
    """

    def __init__(self, model: nn.Module, weights: Weights | None = None, biases: bool = False) -> None:
        super().__init__(model)
        self.findings = Findings(model, self.origins.parameters, weights, biases)
        self.bits = MadeBits(self.origins)
        self.stored: frozenset[str] = frozenset()
        self.proof: Proof | None = None

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
        if found is not None and not any(self.bits.show(result, found, bits) for bits in watched):
            self.findings.several |= owners
        return result, None

    def _marked(self, step: Step) -> list[Tensor]:
        """Return what an operation is given of bits."""
        pairs = zip(step.given, step.origins, strict=True)
        return [tensor for tensor, origin in pairs if origin is not None and origin.marks]

    def read(self, parameter: str, values: Tensor, operation: str) -> Tensor:
        """Take note of a parameter that an operation of the model reads."""
        if self.in_forward:
            self.findings.reads.add(parameter)
        return values

    def flipped(self, result: Tensor, elements: Elements, mark: Mark, found: TwoValues) -> Tensor:
        """Return what is to be used in place of a tensor that holds bits."""
        return result

    def used(self, operand: Tensor, operation: str, first: bool, origin: Origin) -> Tensor:
        """Look at what the batch is combined with."""
        self.findings.followed |= origin.parameters
        if origin.marks:
            self._use_of_bits(operand, operation, first, origin)
        elif operand.dim() < 2 and not self.findings.biases:
            self.findings.floats |= origin.parameters
        elif not self.in_forward and not operation.startswith(LINEAR_MAPS):
            pass  # an average that is kept of the weights, say
        elif differs_at_once(operand) or (found := two_values(operand)) is None:
            self.findings.floats |= origin.parameters
        elif (owner := self.origins.owner(operand) or self._stored(origin)) is not None:
            if not found.symmetric and not self.findings.is_selective and owner not in self.stored:
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
            self.findings.strangers[self.place, tuple(operand.shape)] = None

    def _stored(self, origin: Origin) -> str | None:
        """Return the site that an operand without marks was read from, if it holds the bits itself."""
        return next(iter(origin.parameters & self.stored), None) if len(origin.parameters) == 1 else None

    def _use_of_bits(self, operand: Tensor, operation: str, first: bool, origin: Origin) -> None:
        marks = [mark for mark in origin.marks if mark in self.bits]
        settled = all(self.bits[mark].feeds is not None and self.bits[mark].sides is None for mark in marks)
        if settled and self.proof is None:
            return
        found = two_values(operand, one_is_enough=True) or self.bits.scaled(operand, marks, origin)
        most = _LEVELS if self.findings.is_selective else 2 ** len(marks)
        if found is None and origin.floats and not few_values(operand, most):
            self.findings.floats |= origin.floats
            # sums with bits of what other bits have left, and signs that floats of the same parameter scale
            if few_values(operand, _LEVELS) or self.bits.have_signs(operand, marks):
                self.not_float(operand)
            return
        shown = [mark for mark in marks if found is not None and self.bits.show(operand, found, self.bits[mark])]
        for mark in shown or marks:
            self.bits[mark] = self.bits[mark]._replace(feeds=True)
            for owner in mark.owners:
                self._add(owner, operand, operation, first, found, stored=False)
                if self.proof is not None:
                    self.proof.check(self, owner, operand, found, self.bits[mark])

    def _add(
        self, owner: str, operand: Tensor, operation: str, first: bool, found: TwoValues | None, stored: bool
    ) -> None:
        """Take note of the first use of a parameter's bits, and of whether all are like the latent's signs."""
        like, zero = compared_with_latent(self.origins, owner, operand, found, self.signs(owner))
        use = self.findings.uses.get(owner)
        if use is None:
            fan_in, scale = form_of(operand, operation, first, found)
            use = Use(self.place, fan_in, scale, stored, like, zero, owner in self.origins.written)
        self.findings.uses[owner] = use._replace(like_latent=use.like_latent and like)

    def signs(self, owner: str) -> Tensor:
        """Return the signs of a parameter, int8, as its bits are to be if they are like them."""
        return whole(self.origins.parameters[owner]).sign().to(torch.int8)
