"""Whether flips reach what a model computes with."""

from collections.abc import Sequence

import torch

from bnnft.injection.finder import Finder
from bnnft.injection.places import How
from bnnft.injection.sites import Site, first_names


def check_reached(finder: Finder, sites: Sequence[Site], how: How) -> None:
    """Raise if layers ran, and did not compute with bits of their parameters that are to be flipped.

    Args:
        finder: that was active meanwhile.
        sites: that are to be flipped.
        how: where; latents may be used in ways that nobody sees, but not as floats.

    Raises:
        RuntimeError: with the reason, for each site.
    """
    if not finder.findings.several and all(site.name in finder.findings.uses for site in sites):  # as in most batches
        return
    first = first_names(finder.model)
    wrong = {site.name: fault for site in sites if (fault := _fault(finder, site, first.get(site.name, ""), how))}
    if wrong:
        faults = "; ".join(f"{name} {fault}" for name, fault in wrong.items())
        raise RuntimeError(f"flips would reach no bit: {faults}. Leave them out with weights=[...]")


def _fault(finder: Finder, site: Site, name: str, how: How) -> str:
    """Return what is wrong with the use of a site, nothing if that is right or not known."""
    module = site.name.rpartition(".")[0]
    if name in finder.findings.several:
        return "holds more than one bit for each element"
    if name in finder.findings.uses or name not in finder.origins.parameters:
        return ""
    if name in finder.findings.floats:
        return "is used as floats" + (" and its latent has no bits" if how == "latent" else "")
    if how == "latent":
        return ""
    if isinstance(finder.model.get_submodule(module), torch.jit.ScriptModule):
        return "is in a scripted module, into which nobody can look (how='latent' flips latents there, unproven)"
    if module not in finder.ran:
        return ""
    if any(place == module for place, _ in finder.findings.strangers):
        return "is not what its layer computes with, which are bits that it keeps, a mask, or integers"
    if name in finder.findings.reads:
        return "is used in a way that can't be followed (how='latent' flips latents, unproven)"
    return ""
