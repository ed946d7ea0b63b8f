"""Check bit by bit that a model computes with exactly the drawn flips, until there is enough evidence."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bnnft.injection.sites import Site
from bnnft.tracing.binary import TwoValues, same_sides, sides_of
from bnnft.tracing.elements import Elements
from bnnft.tracing.sharding import is_sharded, whole

if TYPE_CHECKING:
    from bnnft.injection.bits import Bits
    from bnnft.injection.finder import Finder
    from bnnft.injection.operand import Drawn

_ENOUGH = 100  # flips of a site that were seen
_GROWN = 4  # times the share of flipped bits that was proven


class Proof:
    """What is proven of each site, over as many batches as it takes.

    A site is proven when 100 of its flips were seen, or as many as it has bits, and anew where four times the share of
    its bits is flipped. Every use in a watched batch must show the drawn flips and no others.
    """

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}
        self._share: dict[str, float] = {}
        self._drawn: dict[str, Tensor] = {}  # of the watched batch, by the parameter's first name
        self._clean: dict[str, tuple[Site, Tensor]] = {}  # with the latents, flat, of sites whose bits are their signs
        self._names: dict[str, str] = {}
        self._shown: set[str] = set()
        self.faults: dict[str, str] = {}

    def due(self, site: Site, flips: "Drawn") -> bool:
        """Return whether these flips of a site are to be watched."""
        if not isinstance(flips, Tensor):
            return self._seen.get(site.name, 0) < _ENOUGH
        count, bits = flips.numel(), site.weight.numel()
        enough = self._seen.get(site.name, 0) >= min(_ENOUGH, bits)
        grown = count > _GROWN * self._share.get(site.name, 0.0) * bits and count >= 10
        return count > 0 and (not enough or grown)

    def expect(self, sites: Iterable[Site], flips: Mapping[str, "Drawn"], names: Mapping[str, str]) -> None:
        """Watch the next batch, with these flips; ``names`` maps the sites' to the parameters' first names."""
        self._drawn, self._clean, self._shown, self.faults = {}, {}, set(), {}
        for site in sites:
            drawn, name = flips[site.name], names[site.name]
            self._names[name] = site.name
            if isinstance(drawn, Tensor):
                self._drawn[name] = drawn
                if site.where in ("layer", "latent"):
                    self._clean[name] = site, whole(site.weight).reshape(-1).clone()

    def check(
        self, finder: "Finder", owner: str, operand: Tensor, found: TwoValues | None, bits: "Bits | None"
    ) -> None:
        """Compare an operand that was made of a parameter's bits with what was drawn for it."""
        if owner not in self._names or found is None:
            return
        name, sides = self._names[owner], sides_of(operand, found)
        if owner in self._clean:
            flat = self._expected(owner)
            expected = finder.origins.at(operand, flat.view(finder.origins.parameters[owner].shape), Elements(owner))
            wrong = None if expected is None else sides * expected < 0
            if wrong is not None and bool(wrong.any()):
                drawn = torch.zeros_like(flat, dtype=torch.bool)
                drawn[self._drawn[owner]] = True
                at = finder.origins.at(
                    operand, drawn.to(torch.int8).view(finder.origins.parameters[owner].shape), Elements(owner)
                )
                assert at is not None
                missed = int((wrong & (at > 0)).sum())
                self.faults[name] = (
                    f"{name}: {missed} of {int(at.sum())} drawn bits missed, {int(wrong.sum()) - missed} others flipped"
                )
        elif bits is not None and bits.sides is not None:
            expected = finder.origins.at(operand, bits.sides, bits.elements)
            if expected is not None and not same_sides(sides, expected):
                self.faults[name] = f"{name}: the batch met other bits than those that were made with the drawn flips"
        self._shown.add(name)

    def _expected(self, owner: str) -> Tensor:
        """Return the signs that a layer is to make of a latent weight now, int8 and flat."""
        (site, before), drawn = self._clean[owner], self._drawn[owner]
        expected = _stored_signs(before, site.zero)
        expected[drawn] *= -1
        if is_sharded(site.weight):
            return expected
        now = site.weight.detach().reshape(-1)
        signs = _stored_signs(now, site.zero)
        if site.where == "layer":
            signs[drawn] *= -1
        # between two evaluations of a batch an optimizer may have moved it
        return torch.where(now.abs() == before.abs(), expected, signs)

    def conclude(self, sites: Iterable[Site]) -> None:
        """Count what the watched batch has shown of each site."""
        first = {name: owner for owner, name in self._names.items()}
        for site in sites:
            drawn = self._drawn.get(first.get(site.name, ""))
            if site.name in self._shown and site.name not in self.faults:
                count = _ENOUGH if drawn is None else drawn.numel()
                self._seen[site.name] = self._seen.get(site.name, 0) + count
                share = 1.0 if drawn is None else count / max(site.weight.numel(), 1)
                self._share[site.name] = max(self._share.get(site.name, 0.0), share)
            elif site.name in self.faults:
                self._seen.pop(site.name, None)
        self._drawn, self._clean = {}, {}


def _stored_signs(flat: Tensor, zero: int | None) -> Tensor:
    """Return the signs that a layer makes of its latent weight, int8."""
    signs = flat.signbit().to(torch.int8).mul_(-2).add_(1)
    if zero is not None:
        signs[flat == 0] = zero
    return signs
