"""Where the bits of sites are flipped: in the layer, where they are made, or in the latent weight."""

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn

from bnnft.injection.sites import Site
from bnnft.tracing.compiled import compiled_modules

How = Literal["auto", "operand", "latent"]


def placed(model: nn.Module, sites: Sequence[Site], how: How) -> list[Site]:
    """Return sites with the place where their bits are to be flipped.

    Args:
        model: with the sites.
        sites: with the place that is right for their layers.
        how: ``"operand"`` flips bits where they are made; ``"latent"`` the signs of latent weights; ``"auto"`` where
            they are made, and in modules that run in a compiled graph the latents whose signs are the bits.
    """
    if how == "operand":
        return list(sites)
    if how == "latent":
        return [site._replace(where="latent") for site in sites]
    compiled = compiled_modules(model)
    return [
        site._replace(where="latent")
        if site.where == "made" and site.layer in compiled and site.like_latent is not False
        else site
        for site in sites
    ]


def moved(sites: Sequence[Site], faults: Mapping[str, str], how: How) -> list[Site]:
    """Return sites of which some have their bits flipped where they are made, no longer in the layer or the latent.

    Args:
        sites: some or all of a model.
        faults: what is wrong with the flips of sites, by their names.
        how: see :func:`placed`.

    Raises:
        RuntimeError: they are flipped there already, or the latent was asked for.
    """
    result = list(sites)
    for number, site in enumerate(sites):
        if site.name not in faults:
            continue
        if how == "latent":
            raise no_latent(faults[site.name])
        if site.where not in ("layer", "latent"):
            raise RuntimeError(
                f"these layers do not compute with the drawn flips ({faults[site.name]}): leave them out with "
                "weights=[...]"
            )
        result[number] = site._replace(where="made")
    return result


def no_latent(fault: str) -> RuntimeError:
    """Return the error that flips of latents were asked for and are wrong."""
    return RuntimeError(
        f"these layers do not compute with the drawn flips ({fault}): the sign of their latent weight is not the bit "
        "in every use. how='operand' flips the bits where they are made"
    )
