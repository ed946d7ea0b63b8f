"""Check bit by bit that a model computed with exactly the drawn flips."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bnnft.injection.operand import Flips
from bnnft.injection.operands import OperandWatch
from bnnft.injection.sites import Site
from bnnft.tracing.sharding import whole


def stored_signs(sites: Sequence[Site]) -> dict[str, Tensor]:
    """Return the signs that layers make of their clean latent weights, int8 and flat, by the sites' names."""
    signs = {}
    for site in sites:
        flat = whole(site.weight).reshape(-1)
        signs[site.name] = flat.signbit().to(torch.int8).mul_(-2).add_(1)
        if site.zero is not None:
            signs[site.name][flat == 0] = site.zero
    return signs


def find_faults(
    sites: Sequence[Site], watch: OperandWatch, clean: Mapping[str, Tensor], flips: Mapping[str, Flips]
) -> dict[str, str]:
    """Return for each site whose operand shows other flips than were drawn what is wrong.

    Args:
        sites: whose latent weights were turned.
        watch: of the batch, before the bits are put back.
        clean: from :func:`stored_signs`, before the bits were turned.
        flips: the drawn flat indices.
    """
    seen = {id(watch.parameters[name]): operand.signs for name, operand in watch.operands().items()}
    faults = {}
    for site in sites:
        if site.in_operand or id(site.weight) not in seen:
            continue
        before, after = clean[site.name], seen[id(site.weight)]
        drawn = torch.zeros_like(before, dtype=torch.bool)
        indices = flips[site.name]
        assert isinstance(indices, Tensor)  # drawn, since they are in the latent weight
        drawn[indices] = True
        turned, bits = after != before, (after != 0) & (before != 0)
        missed, extra = int((drawn & ~turned & bits).sum()), int((~drawn & turned & bits).sum())
        if missed or extra:
            faults[site.name] = f"{site.name}: {missed} of {int(drawn.sum())} drawn bits missed, {extra} others turned"
    return faults
