"""Tensors of bits that were made of parameters, and whether an operand shows them."""

from collections.abc import Sequence

from torch import Tensor

from bnnft.injection.bits import Bits, Mark, by_signs, has_rank_one, is_masked, owners_of
from bnnft.tracing.binary import TwoValues, same_sides, sides_of
from bnnft.tracing.origins import Origin, Origins


class MadeBits(dict[Mark, Bits]):
    """What is known of tensors of bits, by where they are made.

    Args:
        origins: of all tensors.
    """

    def __init__(self, origins: Origins) -> None:
        super().__init__()
        self._origins = origins

    def settle(self) -> None:
        """Take what else was made of a parameter in use for bits, if it has the same sides; forget all tensors."""
        for mark, bits in self.items():
            feeding = [b.sides for m, b in self.items() if b.feeds and m.owners == mark.owners]
            known = [sides for sides in feeding if sides is not None]
            if bits.feeds is None and bits.sides is not None and known:
                same = any(sides.shape == bits.sides.shape and same_sides(sides, bits.sides) for sides in known)
                self[mark] = bits._replace(feeds=same)
        self.update({mark: bits._replace(sides=None, elements=None) for mark, bits in self.items()})

    def show(self, operand: Tensor, found: TwoValues, bits: Bits) -> bool:
        """Return whether an operand has the sides of a tensor of bits, up to the sign of a scale."""
        expected = None if bits.sides is None else self._origins.at(operand, bits.sides, bits.elements)
        return expected is not None and same_sides(sides_of(operand, found), expected)

    def have_signs(self, operand: Tensor, marks: Sequence[Mark]) -> bool:
        """Return whether the signs of an operand are those of bits."""
        bits = [self[mark] for mark in marks if self[mark].symmetric]
        return any(self.show(operand, by_signs(operand), each) for each in bits)

    def scaled(self, operand: Tensor, marks: Sequence[Mark], origin: Origin) -> TwoValues | None:
        """Return the values of bits with scales of any shape, unless floats of the same parameter may be in them."""
        found = by_signs(operand)
        alone = owners_of(marks).isdisjoint(origin.floats) or has_rank_one(found.half) or is_masked(found.half)
        return found if alone and self.have_signs(operand, marks) else None
