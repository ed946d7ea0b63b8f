"""The stored bits of a model: where they are, where each is flipped, and what of that is proven."""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bnnft.ber import ErrorModel, Key, checked_choice, checked_flips
from bnnft.injection.activation import ActivationFlips, Target, checked_target, find_activations
from bnnft.injection.latent import LatentFlips
from bnnft.injection.layer import LayerFlips
from bnnft.injection.operand import Drawn, OperandFlips
from bnnft.injection.overlaps import entered, overlaps
from bnnft.injection.places import How, moved, no_latent, placed
from bnnft.injection.proof import Proof
from bnnft.injection.reached import check_reached
from bnnft.injection.sites import Site, Weights, first_names, known_sites, moved_sites
from bnnft.tracing.compiled import compiled_modules
from bnnft.tracing.sharding import whole


def draw_flips(sites: Sequence[Site], error_model: ErrorModel, key: Key) -> dict[str, Drawn]:
    """Return for each site's name the sorted flat indices of the bits that read wrong.

    Where they depend on bits that only the forward makes, what draws them then.
    """
    return {site.name: draw_site(site, error_model, key) for site in sites}


def draw_site(site: Site, error_model: ErrorModel, key: Key) -> Drawn:
    """Return the sorted flat indices of the bits of one site that read wrong, or what draws them."""
    own = key.at(site.position, site.name)

    def drawn(weight: Tensor) -> Tensor:
        return checked_flips(error_model.flips(weight, own), weight, error_model, site.name)

    if not error_model.reads_bits:
        return drawn(site.weight.detach())
    if site.where in ("made", "stored"):
        return drawn
    weight = whole(site.weight)
    return drawn(weight if site.zero is None else torch.where(weight == 0, float(site.zero), weight))


def is_none(flips: Drawn) -> bool:
    """Return whether no bit is flipped."""
    return isinstance(flips, Tensor) and flips.numel() == 0


class Injection:
    """The stored bits of a model, and the flips of them. Nothing is flipped but inside of :meth:`under`.

    Args:
        model: any module.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.
        how: ``"operand"`` flips bits where they are made; ``"latent"`` the signs of latent weights; ``"auto"`` where
            they are made, and in modules that run in a compiled graph the latents whose signs are the bits.
        target: flip ``"weights"``, ``"activations"`` or ``"both"``.
        activations: patterns of the names of binary activations, see
            :func:`bnnft.injection.activation.find_activations`.
        biases: flip binary biases too.
        exact: let the gradient of a flipped bit change sign; else it passes as if nothing was flipped.

    Attributes:
        sites: that are known so far; :meth:`learn` adds those that :attr:`finder` saw.
        neurons: names of the modules whose binary outputs are flipped.
        proof: of the flips of each site.
        finder: looks for binary weights while the model runs in its context, and flips bits where they are made.

    Raises:
        TypeError, ValueError: an argument is out of range, or a pattern matches nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Weights | None = None,
        how: How = "auto",
        target: Target = "weights",
        activations: Sequence[str] | None = None,
        biases: bool = False,
        exact: bool = False,
    ) -> None:
        checked_choice(how, How, "how")
        checked_target(target, activations)
        if not isinstance(biases, bool):
            raise TypeError(f"biases must be True or False, got {biases!r}")
        self.model, self.how, self.target, self._exact, self._weights = model, how, target, exact, weights
        self.neurons = [] if target == "weights" else find_activations(model, activations)
        self.proof = Proof()
        self._finder = partial(OperandFlips, model, weights, biases, exact)
        self.finder = self._finder()
        self.sites = [] if target == "activations" else self.placed(known_sites(model, weights))

    def learn(self, left_out: Container[str] = ()) -> None:
        """Take the sites that the model was seen to compute with, but for some.

        Raises:
            RuntimeError: flips of latents are asked for, and the signs of one are not its bits.
        """
        before = {site.name: site for site in self.sites}
        found = [site for site in self.placed(self.finder.findings.sites()) if site.name not in left_out]
        for number, site in enumerate(found):
            known = before.get(site.name)
            if known is not None and known.where in ("made", "stored") and site.where == "layer":
                found[number] = site._replace(where=known.where)  # the layer is not its only use
            elif self.how == "latent" and site.like_latent is False:
                raise no_latent(f"{site.name}: its operand has other signs, or it is used as a float too")
        check_reached(self.finder, found, self.how)
        self.finder.bits.settle()
        self.sites = found

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Run the model without flips, and look what it computes with; then :meth:`learn`."""
        finder = self.finder
        draw, finder.draw = finder.draw, None
        finder.flips, finder.stored, finder.elsewhere, finder.proof = {}, frozenset(), frozenset(), None
        try:
            with finder:
                yield
        finally:
            finder.draw = draw

    def is_due(self, flips: Mapping[str, Drawn]) -> bool:
        """Return whether these flips are to be watched, since those of some site are not proven yet."""
        return any(self.proof.due(site, flips[site.name]) for site in self.sites)

    def conclude(self) -> bool:
        """Take what a watched run has proven; return whether something is flipped elsewhere from now on.

        Raises:
            RuntimeError: a layer did not compute with the drawn flips, and there is nowhere else to flip its bits; the
                bits of a site are not what its layer computes with.
        """
        self.finder.bits.settle()
        check_reached(self.finder, self.sites, self.how)
        if self.finder.proof is None:
            return False
        self.finder.proof = None
        self.proof.conclude(self.sites)
        self.flip_where_made(self.proof.faults)
        return bool(self.proof.faults)

    def flip_where_made(self, faults: Mapping[str, str]) -> None:
        """Flip the bits of some sites where they are made from now on; see :func:`bnnft.injection.places.moved`."""
        self.sites = moved(self.sites, faults, self.how)

    def renew(self) -> None:
        """Take note of other parameters than before; what is no longer there is forgotten."""
        self.finder = self._finder()
        known = known_sites(self.model, self._weights) if self.target != "activations" else []
        self.sites = moved_sites(self.model, self.sites, self.placed(known))

    def placed(self, sites: Sequence[Site]) -> list[Site]:
        """Return sites with the place where their bits are to be flipped."""
        return placed(self.model, sites, self.how)

    def check_layers(self, error_model: ErrorModel) -> None:
        """Raise ValueError if an error model that differs by layer does not fit the sites and activations."""
        error_model.check_layers([*(site.name for site in self.sites), *self.neurons])

    @contextmanager
    def under(
        self, flips: Mapping[str, Drawn], error_model: ErrorModel, key: Key, watch: bool = False
    ) -> Iterator[None]:
        """Run the model with flips.

        Args:
            flips: of each site, from :func:`draw_flips`.
            error_model: of the flips of activations.
            key: of these.
            watch: look for what is not known yet, and for what is not proven; then :meth:`conclude`.
        """
        here = {site.name: flips[site.name] for site in self.sites if not is_none(flips[site.name])}
        flipped = [site for site in self.sites if site.name in here]
        layer, latent = ([site for site in flipped if site.where == where] for where in ("layer", "latent"))
        made = [site for site in flipped if site.where in ("made", "stored")]
        drawn = {name: each for name, each in here.items() if isinstance(each, Tensor)}
        lent = LayerFlips(self.model, layer, drawn, self._exact, bool(compiled_modules(self.model)))
        contexts: list[Any] = [
            ActivationFlips(self.model, self.neurons, error_model, key, self._exact),
            lent,
            LatentFlips(self.model, latent, drawn, exact=self._exact, check=watch),
        ]
        if watch or made:
            first = first_names(self.model)
            self.finder.flips = {first[site.name]: here[site.name] for site in made}
            self.finder.stored = frozenset(first[site.name] for site in made if site.where == "stored")
            self.finder.elsewhere = frozenset(first[site.name] for site in self.sites) - set(self.finder.flips)
            self.finder.constants = lent.places
            self.finder.proof = self.proof if self.is_due(flips) and not overlaps(self.finder) else None
            if self.finder.proof is not None:
                self.proof.expect(self.sites, flips, first)
            contexts.append(self.finder)
        yield from entered(self.finder, contexts)
