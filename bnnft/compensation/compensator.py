"""Runs a model compensated, under one error model after the other."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bnnft.ber import ErrorModel, checked_bit_rates
from bnnft.compensation.correction import Correction, Corrections, Statistics
from bnnft.compensation.method import Method
from bnnft.compensation.plan import Layer, Plan, Planner
from bnnft.injection.gathered import gathered_at
from bnnft.injection.sites import Weights, binarized_weights
from bnnft.tracing.state import unchanged


class Compensator:
    """A model whose sums are corrected for errors. What can be corrected is found in a forward that it is shown first.

    Args:
        model: any module with binarized weights.
        method: how errors are compensated.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.
        data: there will be samples for recalibration.

    Attributes:
        plan: what was found; ``None`` before the first forward.
        statistics: of batch norms that were recalibrated in the first forward, if any.

    Raises:
        ValueError: a pattern matches nothing.
    """

    def __init__(self, model: nn.Module, method: Method, weights: Weights | None = None, data: bool = False) -> None:
        binarized_weights(model, weights)  # raises for a pattern that matches nothing
        self.model, self.method, self.plan = model, method, None
        self._weights, self._data = weights, data

    plan: Plan | None
    statistics: dict[str, Statistics] | None = None

    def look(self, forward: Callable[[], Any]) -> None:
        """Find what can be corrected, in one forward that leaves nothing behind.

        Raises:
            ValueError: there is nothing to correct, or a batch norm has no statistics to scale.
        """
        planner = Planner(self.model, self._weights)
        with unchanged(self.model), torch.no_grad(), planner:
            forward()
        with torch._C.DisableTorchFunction():  # our own operations are nobody's business
            plan = planner.plan()
        _check(plan, self.method, self.model, self._data)
        self.plan = plan

    @property
    def norms(self) -> Sequence[str]:
        """Names of the batch norms that are to be recalibrated: all, since the errors of one layer reach the next."""
        plan, method = self.plan, self.method
        assert plan is not None
        doubtful = any(layer.doubt for layer in plan.layers)
        return plan.norms if method.recalibrates or (method.auto and self._data and doubtful) else ()

    def is_needed(self, error_model: ErrorModel) -> bool:
        """Return whether sums are others under an error model than when statistics were gathered."""
        assert self.plan is not None
        left = [(self.left(layer, error_model), self.shift(layer, error_model)) for layer in self.plan.layers]
        return any(each != (1, 0) for each in left)

    def corrections(self, error_model: ErrorModel) -> dict[str, list[Correction]]:
        """Return for each layer what is to be corrected under an error model.

        Raises:
            ValueError: the rates of stored bits are not known, or nothing is left of a sum.
        """
        assert self.plan is not None
        found: dict[str, list[Correction]] = {}
        for layer in self.plan.layers:
            correction = self._correction(layer, error_model)
            if correction.left != 1 or correction.shift:
                found.setdefault(layer.name, []).append(correction)
        return found

    def _correction(self, layer: Layer, error_model: ErrorModel) -> Correction:
        method, site, plan = self.method, layer.site, self.plan
        assert plan is not None
        scales = method.scales and layer.name not in plan.unfixed and not (method.auto and layer.doubt)
        left = self.left(layer, error_model)
        shift = self.shift(layer, error_model) if method.shifts else 0.0
        return Correction(site.weight.numel(), left if scales else 1.0, shift, site.scale is not None)

    def left(self, layer: Layer, error_model: ErrorModel) -> float:
        """Return what is left of a layer's sums under errors, of what was left when statistics were gathered.

        Raises:
            ValueError: nothing is left, or the rates are not known.
        """
        name = layer.site.name
        to_1, to_0 = checked_bit_rates(error_model, name)
        then_1, then_0 = self._gathered(name)
        now, then = 1 - to_1 - to_0, 1 - then_1 - then_0
        if now <= 0 or then <= 0:
            raise ValueError(
                f"nothing is left of the sums with {name}: 1 - p01 - p10 must be above 0, got rates of {to_1} and "
                f"{to_0}, and {then_1} and {then_0} when statistics were gathered"
            )
        return now / then

    def shift(self, layer: Layer, error_model: ErrorModel) -> float:
        """Return by how much of the sum of its inputs a layer's sums are shifted, beyond when statistics were gathered.

        A sum reads as ``c s + d X``, and the statistics are of ``c' s + d' X``: it is ``d - d' c / c'``.
        """
        (to_1, to_0), (then_1, then_0) = (
            checked_bit_rates(error_model, layer.site.name),
            self._gathered(layer.site.name),
        )
        return (to_1 - to_0) - self.left(layer, error_model) * (then_1 - then_0)

    def _gathered(self, name: str) -> tuple[float, float]:
        """Return the rates at which statistics were gathered.

        Raises:
            ValueError: they were gathered at unknown ones.
        """
        if self.method.gathered_at is not None:
            return checked_bit_rates(self.method.gathered_at, name)
        rates = gathered_at(self.model).get(name, (0.0, 0.0))
        if rates is None:
            raise ValueError(
                f"the statistics behind {name} were gathered under errors whose rates are not known: give gathered_at="
            )
        return rates

    @contextmanager
    def under(self, error_model: ErrorModel, statistics: dict[str, Statistics] | None = None) -> Iterator[Corrections]:
        """Run the model compensated for an error model.

        Args:
            error_model: of the errors that it runs under.
            statistics: of batch norms, from :meth:`gathering`.
        """
        with Corrections(self.model, self.corrections(error_model), statistics or {}) as corrections:
            yield corrections

    @contextmanager
    def gathering(self, error_model: ErrorModel, statistics: dict[str, Statistics]) -> Iterator[None]:
        """Take the statistics of what batch norms are given into a dict, while the model runs under these errors."""
        corrections = Corrections(self.model, self.corrections(error_model), statistics, self.norms)
        with unchanged(self.model), torch.no_grad(), corrections:
            yield


def _check(plan: Plan, method: Method, model: nn.Module, data: bool) -> None:
    """Raise ValueError for what the plan can't do, and warn of what it leaves out."""
    doubtful = {layer.name: layer.doubt for layer in plan.layers if layer.doubt}
    if not plan.layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in plan.left_out.items())
        raise ValueError(f"no sum of {type(model).__name__} can be corrected. {reasons}".rstrip(". "))
    if method.scales and not method.auto and plan.unfixed:
        layer, norm = next(iter(plan.unfixed.items()))
        raise ValueError(
            f"thresholds of {layer} can't be scaled: {norm} has no running statistics or does not use them now "
            "(in training mode, say)"
        )
    if (method.recalibrates or (method.auto and doubtful and data)) and not plan.norms:
        raise ValueError(f"{type(model).__name__} has no batch norm with running statistics to recalibrate")
    if plan.left_out:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in plan.left_out.items())
        warnings.warn(f"compensation leaves out {reasons}", stacklevel=3)
    if method.auto and doubtful:
        what = "statistics are gathered anew" if data else "that needs data: only a known shift is subtracted"
        reasons = "; ".join(f"{name}: {doubt}" for name, doubt in doubtful.items())
        warnings.warn(f"compensation does not scale where that does not help ({reasons}); {what}", stacklevel=3)
