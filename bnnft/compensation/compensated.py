"""Run a model compensated for bit errors."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bnnft.ber import ErrorModel, as_error_model, checked_bit_rates
from bnnft.compensation.compensator import Compensator
from bnnft.compensation.correction import Statistics
from bnnft.compensation.method import Method, as_method
from bnnft.injection.sites import Weights, known_sites
from bnnft.tracing.mode import Hook


@contextmanager
def compensated(
    model: nn.Module,
    error_model: float | ErrorModel,
    kind: str | Sequence[str] | Method = "auto",
    *,
    data: Iterable[Any] | None = None,
    weights: Weights | None = None,
) -> Iterator[None]:
    """Run a model with its sums corrected for the mean of what bit errors do to them; nothing is written to it.

    Flips may be entered before or after: their own context is :func:`bnnft.flipped`, and a model in a real memory has
    them anyway. What can be corrected is found in the first forward inside, which runs twice for that. What is compiled
    runs as it was written.

    Args:
        model: any module with binarized weights, in eval mode.
        error_model: a bit error rate in [0, 1], or an error model of :mod:`bnnft.ber` that says its rates.
        kind: ``"thresholds"``, ``"input_sum"``, ``"recalibration"``, several of them, ``"auto"``, or a
            :class:`bnnft.compensation.Method`, which see.
        data: for recalibration: batches of inputs, or of ``(inputs, targets)``. They run in the first forward inside,
            under the errors that the model has then.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.

    Raises:
        TypeError, ValueError: an argument is out of range, the rates are not known, or recalibration has no data; in
            the first forward, no sum can be corrected, or a batch norm has no statistics.

    Example:
        >>> from bnnft.injection.flipped import flipped
        >>> from bnnft.ber import Asymmetric
        >>> from bnnft.nn import BinaryLinear
        >>> model, x, errors = BinaryLinear(1000, 20, bias=False), torch.ones(1, 1000), Asymmetric(0, 0.2)
        >>> clean = model(x).detach()
        >>> with flipped(model, errors):
        ...     wrong = model(x).detach()
        ...     with compensated(model, errors):
        ...         right = model(x).detach()
        >>> float((wrong - clean).mean()) < -80, abs(float((right - clean).mean())) < 20, torch.equal(model(x), clean)
        (True, True, True)
    """
    error_model, method = as_error_model(error_model), checked_here(as_method(kind), data)
    for site in known_sites(model, weights):
        checked_bit_rates(error_model, site.name)
    with running(Compensator(model, method, weights, data is not None), error_model, data):
        yield


@contextmanager
def running(compensator: Compensator, error_model: ErrorModel, data: Iterable[Any] | None = None) -> Iterator[None]:
    """Run the model of a compensator; what it can correct is found, and data run, in the first forward inside once."""
    with ExitStack() as inside, ExitStack() as hooks:

        def begin(name: str, module: nn.Module, args: Any, kwargs: Any = None) -> None:
            if kwargs is None:  # it was taken away since torch has listed the hooks of this call
                return
            hooks.close()  # before the forwards that this one starts
            compensator.look(lambda: module(*args, **kwargs))
            compensator.statistics = _statistics(compensator, error_model, data)
            inside.enter_context(compensator.under(error_model, compensator.statistics)).begin_in(name)

        if compensator.plan is not None:
            inside.enter_context(compensator.under(error_model, compensator.statistics))
        else:
            for name, module in compensator.model.named_modules():
                if not isinstance(module, torch.jit.ScriptModule):
                    own = Hook(partial(begin, name))
                    hook = module.register_forward_pre_hook(own, with_kwargs=True, prepend=True)
                    hooks.callback(hook.remove)
        yield


def _statistics(
    compensator: Compensator, error_model: ErrorModel, data: Iterable[Any] | None
) -> dict[str, Statistics] | None:
    """Return the statistics of the batch norms that are recalibrated, of the first samples of the data."""
    if data is None or not compensator.norms:
        return None
    model, statistics, samples = compensator.model, dict[str, Statistics](), 0
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    with compensator.gathering(error_model, statistics):
        for batch in data:
            inputs = batch[0] if isinstance(batch, tuple | list) else batch
            inputs = tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)
            model(inputs)
            samples += len(inputs)
            if samples >= compensator.method.samples:
                break
    if samples < 2:
        raise ValueError(f"recalibration needs two samples or more in data=, got {samples}")
    return statistics


def checked_here(method: Method, data: Iterable[Any] | None) -> Method:
    """Return a method, or raise ValueError if it can't be that of a model that runs under whatever errors it has."""
    if method.recalibrates and data is None:
        raise ValueError("recalibration needs data=: batches of inputs, or of (inputs, targets)")
    if method.die == "other":
        raise ValueError("die='other' is for curves: elsewhere samples run under the errors that the model has then")
    return method
