"""Train under bit errors: find the stored bits, flip them in each batch, prove the flips, restore."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from bnnft.ber import ErrorModel, Key, Schedule, as_error_model, checked_choice
from bnnft.injection.activation import Target
from bnnft.injection.flipped import Gradient
from bnnft.injection.gathered import gathered_at, note, take_down
from bnnft.injection.injection import Injection, draw_flips, is_none
from bnnft.injection.places import How
from bnnft.injection.remarks import Remarks
from bnnft.injection.restored import Restored
from bnnft.injection.scheduled import ScheduledErrors
from bnnft.injection.sites import Weights, no_sites, sites_of, state_of
from bnnft.injection.undecided import Undecided, unsettled

_LOG = logging.getLogger(__name__)


class BitFlips:
    """The flips of a training run: found, drawn, proven and restored batch by batch, on any module and in any loop.

    Layers of :mod:`bnnft.nn`, brevitas and bitorch, and named weights, have flips in their first batch. Others are
    found in the batch in which they first run, which stays clean for them, whenever that is.

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
        >>> import torch
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
        self._say, self._remarks = say, Remarks(say, warn)
        self._look = target != "activations"
        self._parameters: list[tuple[str, int]] = []
        self._undecided = Undecided(self.injection.finder, say)
        self._restored = Restored()

    @contextmanager
    def batch(self) -> Iterator["Batch"]:
        """Run a training batch: its forwards and backwards, and the optimizer's step if you like."""
        batch = Batch(self)
        try:
            batch.begin()
            yield batch
            batch.finish()
        except BaseException:
            batch.cancel()
            raise

    def look_again(self) -> None:
        """Watch the next batch for binary weights that are not known yet; good to do once in each epoch."""
        self._look = self.injection.target != "activations"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in plain types."""
        sites = [state_of(site) for site in self.injection.sites]
        start, gathered = self.errors.start, gathered_at(self.model)
        return {"draws": self.batches, "sites": sites, "start": start, "gathered_at": gathered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batches that were done, with flips where they went.

        Raises:
            ValueError: the model has no such parameters.
        """
        self.batches, self.errors.start = state["draws"], state["start"]
        take_down(self.model, state.get("gathered_at", {}))
        if state["sites"]:
            self.injection.sites = self.injection.placed(sites_of(self.model, state["sites"]))

    def _begin(self) -> tuple[Callable[[], AbstractContextManager[None]], bool]:
        """Draw the flips of a batch; return what makes the context that flips them, and whether there are any."""
        injection, key = self.injection, Key(self.seed, self.batches, purpose="training")
        self._notice_new_parameters()
        error_model = self.errors.at(self.batches)
        injection.flip_where_made(self._restored.faults())
        flips = draw_flips(injection.sites, error_model, key)
        watch = injection.target != "activations" and (
            self._look or injection.is_due(flips) or unsettled(self.model, injection.sites, injection.finder)
        )
        if watch:
            self._restored.expect(injection.sites, flips)
        under = partial(injection.under, flips, error_model, key, watch=watch)
        return under, bool(injection.neurons) or not all(map(is_none, flips.values()))

    def _finish(self) -> None:
        """Learn from a batch that is done."""
        injection, finder = self.injection, self.injection.finder
        if injection.target == "activations":
            return
        note(self.model, injection.sites, self.errors.at(self.batches - 1))
        injection.conclude()
        seen = bool(finder.findings.uses or finder.findings.floats)
        if finder.findings.uses.keys() - {site.name for site in injection.sites} or (self._look and seen):
            self._learn()
        self._remarks.on_sites(injection.sites, self.errors.whole)
        self._remarks.on_the_rest(finder)
        if seen:
            self._look = False

    def _learn(self) -> None:
        """Take the sites that were found, but for those that are undecided."""
        injection, finder = self.injection, self.injection.finder
        self._undecided.take({site.name for site in injection.sites}, self.batches)
        injection.learn(left_out=self._undecided)
        if not injection.sites and not unsettled(self.model, [], finder) and not self._undecided:
            raise no_sites(self.model)
        injection.check_layers(self.errors.at(self.batches))

    def _notice_new_parameters(self) -> None:
        """Look again where parameters were added, replaced, renamed or left out since the last batch."""
        now = [(name, id(parameter)) for name, parameter in self.model.named_parameters()]
        if now != self._parameters:
            if self._parameters:
                self.injection.renew()
                self._undecided = Undecided(self.injection.finder, self._say)
                self.look_again()
            self._parameters = now
        if self._undecided.decide(self.batches):
            self._learn()


class Batch:
    """One training batch under flips; made before the first bit is flipped, it can only restore.

    Attributes:
        number: of the batch in its run.
        has_flips: there are bits or activations that may be flipped in it.
    """

    def __init__(self, training: BitFlips) -> None:
        self._training, self._stack = training, ExitStack()
        self.number, self.has_flips = training.batches, False

    def begin(self) -> None:
        """Draw the bits that are wrong in this batch, and flip them."""
        self._under, self.has_flips = self._training._begin()
        self.resume()

    def resume(self) -> None:
        """Flip the same bits again, after a call of :meth:`cancel`."""
        self._stack.enter_context(self._under())

    def cancel(self) -> None:
        """Restore; the batch does not count. More calls do nothing."""
        self._stack.close()

    def finish(self) -> None:
        """Restore, count the batch as done, and learn from it."""
        self._stack.close()
        self._training.batches = self.number + 1
        self._training._finish()
