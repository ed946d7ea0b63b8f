"""Train under bit errors: find the stored bits, flip them in each batch, prove the flips, restore. Knows no Lightning."""

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from bnnft.ber import (
    Constant,
    Curriculum,
    ErrorModel,
    Key,
    Schedule,
    as_error_model,
    checked_choice,
    checked_schedule,
    scaled,
)
from bnnft.injection.activation import Target
from bnnft.injection.flipped import Gradient, How, Injection, draw_flips
from bnnft.injection.proof import Proof
from bnnft.injection.sites import Site, Weights, no_sites, sites_of, state_of
from bnnft.tracing.binary import two_values

_LOG = logging.getLogger(__name__)
_PATIENCE = 10  # batches for which a parameter that starts with two values may stay as it is before it counts as bits


class ScheduledErrors:
    """An error model whose rate moves over training.

    Args:
        error_model: at its whole rate.
        schedule: of its rate; the whole one always if ``None`` or constant.
        seed: of the flips, for schedules that draw.

    Attributes:
        start: the batch at which the schedule began, ``None`` as long as it waits for a low loss.

    Raises:
        TypeError: no schedule, or the error model has no rate that could move.
    """

    def __init__(self, error_model: ErrorModel, schedule: Schedule | None, seed: int) -> None:
        checked_schedule(schedule)
        # the whole rate always: also of errors that have no rate, and nothing to log
        self.schedule = None if isinstance(schedule, Constant) else schedule
        if self.schedule is not None:
            scaled(error_model, 0.5)  # raises if it has no rate
        self.start: int | None = None if isinstance(schedule, Curriculum) else 0
        self._whole, self._seed = error_model, seed
        self._last = 1.0, error_model

    def factor(self, batch: int) -> float:
        """Return which part of its rate the error model has in a batch."""
        if self.schedule is None:
            return 1.0
        return 0.0 if self.start is None else self.schedule.factor(batch - self.start, self._seed)

    def at(self, batch: int) -> ErrorModel:
        """Return the error model of a batch."""
        factor = self.factor(batch)
        if factor != self._last[0]:  # a chip keeps its cells as long as its rate stays
            self._last = factor, scaled(self._whole, factor)
        return self._last[1]

    @property
    def waits(self) -> bool:
        """Whether it waits for the loss of a batch to be low."""
        return self.start is None and isinstance(self.schedule, Curriculum)

    def learn(self, loss: float, next_batch: int) -> None:
        """Begin at the next batch, if that waits for a low loss and this one is."""
        if self.waits and loss < self.schedule.loss_below:  # type: ignore[union-attr]
            self.start = next_batch


class BitFlips:
    """The flips of a training run: found, drawn, proven and restored batch by batch, on any module and in any loop.

    Layers of :mod:`bnnft.nn`, brevitas and bitorch, and named weights, have flips in their first batch. Others are found in
    the batch in which they first run, which stays clean for them, whenever that is.

    Args:
        model: any module with binarized weights.
        error_model: a bit error rate in [0, 1] for independent flips, or an error model of :mod:`bnnft.ber`.
        gradient: of a flipped bit, see :func:`bnnft.flipped`.
        seed: of the random bits, >= 0; the flips of a batch depend on it and the batch's number alone.
        weights, how, target, activations: see :func:`bnnft.flipped`.
        biases: flip binary biases too.
        schedule: of the rate over training, of :mod:`bnnft.ber.schedule`.
        say, warn: are given what is said once of the run; logging and warnings by default.

    Attributes:
        injection: with the sites that are known so far.
        errors: the error model over the batches.
        batches: number of batches that are done.

    Raises:
        TypeError, ValueError: an argument is out of range, a pattern matches nothing; after a batch, the model has no
            binarized weights.
        RuntimeError: after a batch, a layer did not compute with the drawn flips.

    Example:
        >>> from bnnft.nn import BinaryLinear
        >>> model = BinaryLinear(8, 2, bias=False)
        >>> training, optimizer = BitFlips(model, 0.1), torch.optim.SGD(model.parameters(), 0.1)
        >>> for batch in torch.randn(3, 4, 8):
        ...     with training.batch():
        ...         model(batch).square().mean().backward()
        ...     optimizer.step()
        >>> training.batches
        3
    """

    def __init__(
        self,
        model: nn.Module,
        error_model: float | ErrorModel,
        *,
        gradient: Gradient = "straight_through",
        seed: int = 0,
        weights: Weights | None = None,
        how: How = "auto",
        biases: bool = False,
        schedule: Schedule | None = None,
        target: Target = "weights",
        activations: Sequence[str] | None = None,
        say: Callable[[str], Any] = _LOG.info,
        warn: Callable[[str], Any] = warnings.warn,
    ) -> None:
        checked_choice(gradient, Gradient, "gradient")
        Key(seed)  # raises if the seed is none
        self.model, self.seed = model, seed
        self.injection = Injection(model, weights, how, target, activations, biases, exact=gradient == "exact")
        self.errors = ScheduledErrors(as_error_model(error_model), schedule, seed)
        self.batches = 0
        self._say, self._warn = say, warn
        self._proof = Proof()
        self._look = target != "activations"
        self._parameters: list[int] = []
        self._waiting: dict[str, tuple[Tensor, int]] = {}  # two-valued from the start: values, and since which batch
        self._released: set[str] = set()
        self._said: set[Any] = set()

    def batch(self) -> "Batch":
        """Return the context of one training batch: its forwards and backwards, and the optimizer's step if you like."""
        return Batch(self)

    def look_again(self) -> None:
        """Watch the next batch for binary weights that are not known yet, as Lightning's callback does in each epoch."""
        self._look = self.injection.target != "activations"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in plain types."""
        return {
            "draws": self.batches,
            "sites": [state_of(site) for site in self.injection.sites],
            "start": self.errors.start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batches that were done, with flips where they went.

        Raises:
            ValueError: the model has no such parameters.
        """
        self.batches, self.errors.start = state["draws"], state["start"]
        if state["sites"]:
            self.injection.sites = self.injection.placed(sites_of(self.model, state["sites"]))

    # --- a batch ------------------------------------------------------------------------------------------------

    def _begin(self, stack: ExitStack) -> None:
        """Draw the flips of a batch, and enter what flips them."""
        injection, key = self.injection, Key(self.seed, self.batches, purpose="training")
        self._notice_new_parameters()
        error_model = self.errors.at(self.batches)
        flips = draw_flips(injection.sites, error_model, key)
        due = any(self._proof.due(site, flips[site.name]) for site in injection.sites)
        watch = injection.target != "activations" and (self._look or due or self._unsettled())
        injection.finder.proof = self._proof if watch and (due or self._look) else None
        if injection.finder.proof is not None:
            self._proof.expect(injection.sites, flips, injection.finder.first_names())
        stack.enter_context(injection.under(flips, error_model, key, watch=watch, check=watch))

    def _finish(self) -> None:
        """Learn from a batch that is done."""
        self.batches += 1
        injection, finder = self.injection, self.injection.finder
        if injection.target == "activations":
            return
        faults: dict[str, str] = {}
        if finder.proof is not None:
            self._proof.conclude(injection.sites)
            faults, finder.proof = self._proof.faults, None
        known = {site.name for site in injection.sites}
        seen = bool(finder.uses or finder.floats)
        if faults or any(name not in known for name in finder.uses) or (self._look and seen):
            self._learn(faults)
        if seen:
            self._look = False

    def _learn(self, faults: dict[str, str]) -> None:
        injection, finder = self.injection, self.injection.finder
        self._hold_back()
        before = {site.name: site for site in injection.sites}
        found = [site for site in injection.placed(finder.sites()) if site.name not in self._waiting]
        injection.sites = [self._judged(site, before.get(site.name), faults) for site in found]
        finder.settle()
        if not injection.sites and not self._unsettled() and not self._waiting:
            raise no_sites(self.model)
        self._report([site for site in injection.sites if before.get(site.name) != site])

    def _judged(self, site: Site, before: Site | None, faults: dict[str, str]) -> Site:
        """Return a site with the place where its flips are exact.

        Raises:
            RuntimeError: there is none, or another one was asked for.
        """
        if before is not None and before.where in ("made", "stored") and site.where == "layer":
            site = site._replace(where=before.where)  # it was found that the layer is not its only use
        fault = faults.get(site.name, "")
        if self.injection.how == "latent":
            if not fault and site.like_latent is False:
                fault = f"{site.name}: its operand has other signs, or it is used as a float too"
            if fault:
                raise RuntimeError(
                    f"these layers do not compute with the drawn flips ({fault}): the sign of their latent weight is not "
                    "the bit in every use. how='operand' flips the bits where they are made"
                )
        elif fault and site.where in ("layer", "latent"):
            return site._replace(where="made")
        elif fault:
            raise RuntimeError(f"these layers do not compute with the drawn flips ({fault}): name other weights=[...]")
        return site

    def _hold_back(self) -> None:
        """Let parameters that hold two values from the start wait: float ones may be initialized so."""
        finder, known = self.injection.finder, {site.name for site in self.injection.sites}
        for name, use in finder.uses.items():
            weight = finder.parameters[name]
            settled = name in known or name in finder.written or name in self._released or not weight.requires_grad
            if use.stored and not settled and name not in self._waiting:
                self._waiting[name] = weight.detach().clone(), self.batches
                self._say(
                    f"{name} holds two values, as binary weights do and as some float layers do at the start: it has flips "
                    "as soon as an update leaves it so"
                )

    def _release(self) -> None:
        """Take those that waited for bits if an update left them with two values, or if none changes them."""
        finder = self.injection.finder
        for name, (values, since) in list(self._waiting.items()):
            weight = finder.parameters[name].detach()
            changed = not torch.equal(weight, values)
            patience = 1 if bool((values.abs() == 1).all()) else _PATIENCE
            if not changed and self.batches - since < patience - 1:
                continue
            del self._waiting[name]
            if changed and two_values(weight) is None:
                del finder.uses[name]
            else:
                self._released.add(name)
                self._learn({})

    # --- what may be there still --------------------------------------------------------------------------------

    def _notice_new_parameters(self) -> None:
        """Look again where parameters were added, replaced or left out since the last batch."""
        now = [id(parameter) for parameter in self.model.parameters()]
        if now != self._parameters:
            if self._parameters:
                self.injection.renew()
                self.look_again()
            self._parameters = now
        self._release()

    def _unsettled(self) -> bool:
        """Return whether the model has weights that nobody has seen yet, or that code of the user's may binarize later."""
        finder, known = self.injection.finder, {id(site.weight) for site in self.injection.sites}
        return any(
            parameter.dim() > 1 and id(parameter) not in known and not (name in finder.floats and plain)
            for name, parameter, plain in _weights(self.model)
        )

    def _report(self, sites: Sequence[Site]) -> None:
        """Say where the flips go, and what is binary and left alone, each once."""
        finder = self.injection.finder
        if sites:
            bits = sum(site.weight.numel() for site in sites)
            names = ", ".join(f"{site.name} ({'known' if site.known else 'found'}, {site.where})" for site in sites)
            self._say(f"BitFlipTraining: {self.errors.at(self.batches)} on {bits:,} bits in {names}")
        biases = [name for name in finder.biases_left() if name not in self._said]
        if biases:
            self._said.update(biases)
            self._say(f"BitFlipTraining leaves binary biases alone: {', '.join(biases)}; biases=True flips them")
        strangers = [stranger for stranger in finder.strangers if stranger not in self._said]
        if strangers:
            self._said.update(strangers)
            where = ", ".join(f"{module or 'the model'} {shape}" for module, shape in strangers)
            self._warn(
                f"binary operands that come of no single parameter have no flips: {where}. They are constants, made of "
                "several parameters, or kept from an earlier forward"
            )


class Batch:
    """One training batch under flips; made before the first bit is flipped, it can only restore.

    Use it as a context, or call :meth:`begin`, and then :meth:`finish` or :meth:`cancel`.
    """

    def __init__(self, training: BitFlips) -> None:
        self._training, self._stack = training, ExitStack()

    def begin(self) -> None:
        """Flip the bits of this batch."""
        self._training._begin(self._stack)

    def cancel(self) -> None:
        """Restore; the batch does not count. More calls do nothing."""
        self._stack.close()

    def finish(self) -> None:
        """Restore, count the batch as done, and learn from it."""
        self._stack.close()
        self._training._finish()

    def __enter__(self) -> Self:
        try:
            self.begin()
        except BaseException:
            self.cancel()
            raise
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        if kind is None:
            self.finish()
        else:
            self.cancel()


def _weights(model: nn.Module) -> list[tuple[str, nn.Parameter, bool]]:
    """Return names and parameters of a model, and whether they are those of a layer of torch's own that binarizes none."""
    found = []
    for prefix, module in model.named_modules():
        plain = type(module).__module__.startswith("torch.nn.") and not isinstance(module, ParametrizationList)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and not nn.parameter.is_lazy(parameter):
                found.append((f"{prefix}.{name}" if prefix else name, parameter, plain))
    return found
