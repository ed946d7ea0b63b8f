"""Run a model with flipped bits: find them, and flip each where that is exact."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bnnft.ber import ErrorModel, Key, as_error_model, check_layers, checked_choice, reads_bits
from bnnft.injection.activation import ActivationFlips, Target, checked_target, find_activations
from bnnft.injection.latent import LatentFlips
from bnnft.injection.layer import LayerFlips
from bnnft.injection.operand import Drawn, OperandFlips
from bnnft.injection.sites import Site, Weights, known_sites, moved_sites, no_sites
from bnnft.tracing.compiled import compiled_modules
from bnnft.tracing.sharding import whole

Gradient = Literal["straight_through", "exact"]
How = Literal["auto", "operand", "latent"]


def draw_flips(sites: Sequence[Site], error_model: ErrorModel, key: Key) -> dict[str, Drawn]:
    """Return for each site's name the sorted flat indices of the bits that read wrong.

    Where they depend on bits that only the forward makes, what draws them then.
    """
    return {site.name: draw_site(site, error_model, key) for site in sites}


def draw_site(site: Site, error_model: ErrorModel, key: Key) -> Drawn:
    """Return the sorted flat indices of the bits of one site that read wrong, or what draws them."""
    own = key.at(site.position, site.name)
    if not reads_bits(error_model):
        return error_model.flips(site.weight.detach(), own)
    if site.where in ("made", "stored"):
        return partial(error_model.flips, key=own)
    weight = whole(site.weight)
    bits = weight if site.zero is None else torch.where(weight == 0, float(site.zero), weight)
    return error_model.flips(bits, own)


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
        checked_target(target)
        self.model, self.how, self.target, self._exact, self._weights = model, how, target, exact, weights
        self.neurons = [] if target == "weights" else find_activations(model, activations)
        self.finder = OperandFlips(model, weights, biases, exact)
        self.sites = [] if target == "activations" else self.placed(known_sites(model, weights))

    def learn(self) -> None:
        """Take the sites that the model was seen to compute with.

        Raises:
            ValueError: there are none.
        """
        if self.target != "activations":
            self.sites = self.placed(self.finder.sites())
            if not self.sites:
                raise no_sites(self.model)

    def renew(self) -> None:
        """Take note of other parameters than before; what is no longer there is forgotten."""
        self.finder.renew()
        known = known_sites(self.model, self._weights) if self.target != "activations" else []
        self.sites = moved_sites(self.model, self.sites, self.placed(known))

    def placed(self, sites: Sequence[Site]) -> list[Site]:
        """Return sites with the place where their bits are to be flipped."""
        if self.how == "operand":
            return list(sites)
        if self.how == "latent":
            return [site._replace(where="latent") for site in sites]
        compiled = compiled_modules(self.model)
        return [
            site._replace(where="latent")
            if site.where == "made" and site.layer in compiled and site.like_latent is not False
            else site
            for site in sites
        ]

    def check_layers(self, error_model: ErrorModel) -> None:
        """Raise ValueError if an error model that differs by layer does not fit the sites and activations."""
        check_layers(error_model, [*(site.name for site in self.sites), *self.neurons])

    @contextmanager
    def under(
        self,
        flips: Mapping[str, Drawn],
        error_model: ErrorModel,
        key: Key,
        watch: bool = False,
        check: bool = False,
    ) -> Iterator[None]:
        """Run the model with flips.

        Args:
            flips: of each site, from :func:`draw_flips`.
            error_model: of the flips of activations.
            key: of these.
            watch: look for what is not known yet.
            check: compare the standing bits of latent weights before each is restored.
        """
        here = {site.name: flips[site.name] for site in self.sites if not is_none(flips[site.name])}
        made = [site for site in self.sites if site.where in ("made", "stored") and site.name in here]
        latent = [site for site in self.sites if site.where == "latent" and site.name in here]
        layer = [site for site in self.sites if site.where == "layer" and site.name in here]
        drawn = {name: each for name, each in here.items() if isinstance(each, Tensor)}
        lent = LayerFlips(self.model, layer, drawn, self._exact, bool(compiled_modules(self.model)))
        contexts: list[Any] = [
            ActivationFlips(self.model, self.neurons, error_model, key, self._exact),
            lent,
            LatentFlips(self.model, latent, drawn, exact=self._exact, check=check),
        ]
        if made or watch:
            first = self.finder.first_names()
            self.finder.flips = {first[site.name]: here[site.name] for site in made}
            self.finder.stored = frozenset(first[site.name] for site in made if site.where == "stored")
            self.finder.elsewhere = frozenset(first[site.name] for site in self.sites) - set(self.finder.flips)
            self.finder.constants = lent.places
            contexts.append(self.finder)
        try:
            try:
                for context in contexts:
                    context.__enter__()
                yield
            finally:
                _leave(contexts)
        except BaseException:
            _leave(contexts)  # again: an interrupt may have come in between
            raise


def _leave(contexts: Sequence[Any]) -> None:
    """Leave contexts, entered or not; each leaves nothing behind when it is asked again."""
    with ExitStack() as stack:
        for context in contexts:
            stack.push(context)


@contextmanager
def flipped(
    model: nn.Module,
    error_model: float | ErrorModel,
    *,
    seed: int = 0,
    draw: int = 0,
    weights: Weights | None = None,
    how: How = "auto",
    gradient: Gradient = "straight_through",
    target: Target = "weights",
    activations: Sequence[str] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Run a model with bit errors; on any exit it is exactly as before.

    Bits of known layers, and of named weights, are flipped from entry on. Those of other layers are found in their
    first forward inside, and flipped in it.

    Args:
        model: any module with binarized weights.
        error_model: a bit error rate in [0, 1] for independent flips, or an error model of :mod:`bnnft.ber`.
        seed: of the random bits, >= 0; the same seed gives the same flips on every device.
        draw: number of the draw (of the fault map) under this seed, >= 0.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.
        how: where bits are flipped: ``"operand"``, where they are made, in every use and without a write to a
            parameter; ``"latent"``, in the signs of latent weights; ``"auto"``, where they are made, and in compiled
            modules in latents whose signs are the bits.
        gradient: of a flipped weight: ``"straight_through"``, where the flip is the identity in backward
            (Buschjaeger et al. 2020, arXiv 2002.00909), or ``"exact"``, where its gradient changes sign
            (Hirtzlin et al. 2019, arXiv 1904.03652). Backward must run inside the context.
        target: flip ``"weights"``, ``"activations"`` or ``"both"``.
        activations: patterns of the names of binary activations, see
            :func:`bnnft.injection.activation.find_activations`.

    Yields:
        For each weight's name the sorted flat indices of its flipped bits; what is found or drawn in a forward is
        added.

    Raises:
        TypeError, ValueError: an argument is out of range, or the model has no such weights.
        RuntimeError: on exit, a layer that was used did not compute with the flips, or no binary weight was found.

    Example:
        >>> import torch
        >>> from bnnft.nn import BinaryLinear
        >>> model, x = BinaryLinear(100, 10, bias=False), torch.ones(1, 100)
        >>> clean = model(x)
        >>> with flipped(model, 0.05, seed=1) as flips:
        ...     changed = not torch.equal(model(x), clean)
        >>> changed, len(flips["weight"]), torch.equal(model(x), clean)
        (True, 54, True)
    """
    checked_choice(gradient, Gradient, "gradient")
    error_model, key = as_error_model(error_model), Key(seed, draw)
    injection = Injection(model, weights, how, target, activations, exact=gradient == "exact")
    injection.check_layers(error_model)
    flips: dict[str, Tensor] = {}

    def noted(name: str, drawn: Drawn) -> Drawn:
        if isinstance(drawn, Tensor):
            flips[name] = drawn
            return drawn
        return lambda bits: flips.setdefault(name, drawn(bits))

    def found(name: str) -> Drawn:
        (site,) = (site for site in injection.finder.sites() if site.name == name)
        return noted(name, draw_site(site, error_model, key))

    drawn = {name: noted(name, each) for name, each in draw_flips(injection.sites, error_model, key).items()}
    watch = how != "latent" and target != "activations" and not compiled_modules(model)
    injection.finder.draw = found if watch else None
    stack = ExitStack()
    try:
        stack.enter_context(injection.under(drawn, error_model, key, watch=watch))
        yield flips
        stack.close()
    except BaseException:
        stack.close()
        raise
    if not drawn and not flips and target != "activations":
        raise no_sites(model)
