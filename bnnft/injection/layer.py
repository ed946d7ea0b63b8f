"""Flip bits in the layers of ``bnnft.nn``, which flip the bits that they make by what they are lent."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from bnnft.injection.known import flips_by_itself
from bnnft.injection.sites import Site
from bnnft.nn.binarize import Flips
from bnnft.nn.layers import StoredBits


class LayerFlips:
    """Lends flips to the layers that make the bits of some sites, while active. Nothing is written to a parameter.

    Args:
        model: the module that is to run.
        sites: whose bits are flipped, those with ``where="layer"``.
        flips: for each site's name the flat indices of the bits.
        exact: let the gradient of a flipped bit change sign; else it passes as if nothing was flipped.
        compiled: lend masks, which keep their shape, so that a compiled graph stays as it is.

    Attributes:
        places: what is lent, a tensor for each site.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        flips: Mapping[str, Tensor],
        exact: bool = False,
        compiled: bool = False,
    ) -> None:
        names = {id(model.get_parameter(site.name)): site.name for site in sites}
        lent = {}
        for site in sites:
            places = flips[site.name]
            if compiled:
                mask = torch.zeros(site.weight.shape, dtype=torch.bool, device=places.device)
                mask.view(-1)[places] = True
                places = mask
            lent[site.name] = Flips(places, exact)
        self.places = [each.places for each in lent.values()]
        layers = [module for module in model.modules() if isinstance(module, StoredBits) and flips_by_itself(module)]
        self._lent = [(layer, lent[names[id(layer.weight)]]) for layer in layers if id(layer.weight) in names]

    def __enter__(self) -> Self:
        for layer, flips in self._lent:
            layer.flips = (*layer.flips, flips)
        return self

    def __exit__(self, *exception: Any) -> None:
        for layer, flips in self._lent:
            rest = tuple(other for other in layer.flips if other is not flips)
            if rest:
                layer.flips = rest
            else:
                vars(layer).pop("flips", None)
