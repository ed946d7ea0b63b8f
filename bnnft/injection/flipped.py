"""Run a model with flipped bits."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn

from bnnft.ber import ErrorModel, Key, as_error_model, checked_choice
from bnnft.injection.activation import Target
from bnnft.injection.injection import Injection, draw_flips, draw_site
from bnnft.injection.look import in_their_order, look
from bnnft.injection.operand import Drawn
from bnnft.injection.places import How
from bnnft.injection.remarks import without_flips
from bnnft.injection.sites import Weights, no_sites
from bnnft.tracing.compiled import compiled_modules
from bnnft.tracing.mode import Hook

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

    Bits of known layers, and of named weights, are flipped from entry on. Before its first forward inside, each module
    that is called runs once more for a look, which leaves no trace and finds the bits of all other layers.

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
        RuntimeError: flips would not reach the bits that a layer computes with; on exit, a layer did not compute with
            them.

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
    injection = Injection(model, weights, how, target, activations, exact=gradient == "exact")
    yield from _Flipping(injection, as_error_model(error_model), Key(seed, draw)).run()


class _Flipping:
    """Flips bits from the beginning on where they are known, and else from the forward on that first uses them."""

    def __init__(self, injection: Injection, error_model: ErrorModel, key: Key) -> None:
        self.flips: dict[str, Tensor] = {}
        self._injection, self._error_model, self._key = injection, error_model, key
        self._drawn: dict[str, Drawn] = {}
        self._looked: WeakSet[nn.Module] = WeakSet()
        self._stack = ExitStack()
        injection.check_layers(error_model)

    def run(self) -> Iterator[dict[str, Tensor]]:
        """Yield the flips while they are there, restore, and raise if they were not right. For ``yield from``."""
        try:
            self.begin()
            yield self.flips
            self.cancel()
        except BaseException:
            self.cancel()
            raise
        self.conclude()

    def begin(self) -> None:
        """Flip, and look at each module before it first runs."""
        if self._injection.target != "activations" and self._injection.how != "latent":
            self._injection.finder.draw = self._found
        self._flip()

    def cancel(self) -> None:
        """Restore."""
        self._stack.close()

    def conclude(self) -> None:
        """Raise if the flips were not right."""
        injection = self._injection
        if injection.target == "activations":
            return
        if injection.conclude():
            raise RuntimeError(f"flips were not exact: {'; '.join(injection.proof.faults.values())}")
        if not self._drawn and not self.flips:
            raise no_sites(injection.model)
        for sentence in without_flips(injection.finder):
            warnings.warn(f"flipped: {sentence}", stacklevel=4)

    def _before(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        """Look at what an outermost module is about to compute with, unless a backward computes it once more."""
        finder = self._injection.finder
        if finder.in_forward or module in self._looked or torch._C._current_graph_task_id() != -1:
            return
        if torch._C._functorch.peek_interpreter_stack() is not None:  # nobody can look inside of a transform
            if not self._drawn:
                raise RuntimeError(
                    "flipped can't look at the model inside of a transform of torch.func: run the model once before, "
                    "inside of flipped, or name its weights with weights=['layer.weight', ...]"
                )
            return
        self._looked.add(module)
        with in_their_order():
            self._stack.close()
            look(self._injection, module, args, kwargs or {})
            self._flip()

    def _flip(self) -> None:
        injection = self._injection
        new = [site for site in injection.sites if site.name not in self._drawn]
        drawn = draw_flips(new, self._error_model, self._key)
        self._drawn |= {name: self._noted(name, each) for name, each in drawn.items()}
        watch = injection.target != "activations" and not compiled_modules(injection.model)
        self._stack.enter_context(injection.under(self._drawn, self._error_model, self._key, watch=watch))
        if injection.target != "activations":
            for module in injection.model.modules():
                if not isinstance(module, torch.jit.ScriptModule):  # before the hooks that flip
                    hook = module.register_forward_pre_hook(Hook(self._before), prepend=True, with_kwargs=True)
                    self._stack.callback(hook.remove)

    def _noted(self, name: str, drawn: Drawn) -> Drawn:
        """Return what draws flips and takes note of them for the user."""
        if isinstance(drawn, Tensor):
            self.flips[name] = drawn
            return drawn
        return lambda bits: self.flips.setdefault(name, drawn(bits))

    def _found(self, name: str) -> Drawn | None:
        """Return the flips of a site that nobody has seen before, in the forward that uses it."""
        sites = self._injection.finder.findings.sites()
        site = next((site for site in sites if site.name == name), None)  # or not selected
        return None if site is None else self._noted(name, draw_site(site, self._error_model, self._key))
