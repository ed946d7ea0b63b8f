"""What was seen of a model's parameters while it ran: which of them hold bits, and which do not."""

from collections.abc import Mapping

from torch import Tensor, nn

from bnnft.injection.bits import Use
from bnnft.injection.sites import Site, Weights, first_names, known_sites


class Findings:
    """What watching a model has shown.

    Args:
        model: that was watched.
        parameters: of the model, by name.
        weights: patterns or a function; then only what they select counts.
        biases: take binary parameters of one dimension too.

    Attributes:
        uses: of binary parameters, by name.
        floats: names of parameters whose values were combined with the batch as floats.
        strangers: binary operands without a single owner: module and shape.
        several: names of parameters of which more than one bit is made for an element, one after the other.
        reads: names of parameters that an operation has read.
        followed: names of parameters that were seen to be combined with the batch.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, Tensor], weights: Weights | None = None, biases: bool = False
    ) -> None:
        self._model, self._parameters, self._weights, self.biases = model, parameters, weights, biases
        self.uses: dict[str, Use] = {}
        self.floats: set[str] = set()
        self.strangers: dict[tuple[str, tuple[int, ...]], None] = {}
        self.several: set[str] = set()
        self.reads: set[str] = set()
        self.followed: set[str] = set()

    @property
    def is_selective(self) -> bool:
        """Whether only what a user has selected counts."""
        return self._weights is not None

    def sites(self) -> list[Site]:
        """Return the sites of the model: known and named ones, and what else it computed with in binary."""
        first = first_names(self._model)
        chosen = {first[site.name]: site for site in known_sites(self._model, self._weights)}
        found = []
        for position, (name, weight) in enumerate(self._model.named_parameters()):
            use, site = self.uses.get(name), chosen.get(name)
            counts = (weight.dim() > 1 or self.biases) and name not in self.several
            if site is None and use is not None and not self.is_selective and counts:
                site = Site(name, weight, position)
            if site is not None:
                found.append(site if use is None else _as_used(site, use, name in self.floats))
        return found

    def biases_left(self) -> list[str]:
        """Return the names of binary parameters of one dimension that do not count as sites."""
        if self.biases or self.is_selective:
            return []
        return [name for name in self.uses if self._parameters[name].dim() < 2]


def _as_used(site: Site, use: Use, is_float: bool) -> Site:
    """Return a site with what was seen of its use; of a known layer it is known how the bits are made."""
    where = "stored" if use.stored and not site.known else site.where
    like, zero = (site.known or use.like_latent) and not is_float, site.zero if site.known else use.zero
    site = site._replace(where=where, zero=zero, like_latent=like)
    return site._replace(layer=use.layer, fan_in=use.fan_in, scale=use.scale)
