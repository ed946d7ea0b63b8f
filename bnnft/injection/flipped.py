"""Run a model with flipped bits."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

from torch import Tensor, nn

from bnnft.ber import ErrorModel, Key, as_error_model, checked_choice
from bnnft.injection.activation import Target
from bnnft.injection.injection import Injection, draw_flips, draw_site
from bnnft.injection.operand import Drawn
from bnnft.injection.places import How
from bnnft.injection.sites import Weights, no_sites
from bnnft.tracing.compiled import compiled_modules

Gradient = Literal["straight_through", "exact"]


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

    def found(name: str) -> Drawn | None:
        site = next((site for site in injection.finder.sites() if site.name == name), None)  # or not selected
        return None if site is None else noted(name, draw_site(site, error_model, key))

    drawn = {name: noted(name, each) for name, each in draw_flips(injection.sites, error_model, key).items()}
    watch = target != "activations" and not compiled_modules(model)
    injection.finder.draw = found if watch and how != "latent" else None
    stack = ExitStack()
    try:
        stack.enter_context(injection.under(drawn, error_model, key, watch=watch))
        yield flips
        stack.close()
    except BaseException:
        stack.close()
        raise
    injection.conclude()
    if how == "latent" and injection.finder.uses:
        injection.learn()
    if not drawn and not flips and target != "activations":
        raise no_sites(model)
