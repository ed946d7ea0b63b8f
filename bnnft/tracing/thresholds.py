"""The threshold of each neuron behind a batch norm."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ORDER = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_ORDER_OF_TORCH = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")


def thresholds(norm: Any) -> Tensor:
    """Return the pre-activation at which each neuron behind a batch norm turns, ``mu - beta sqrt(var + eps) / gamma``.

    Args:
        norm: a batch norm with running statistics, with or without learned gamma and beta.

    Returns:
        One threshold a channel; infinite for a dead neuron (gamma = 0), whose output is the sign of beta always.

    Raises:
        ValueError: no running statistics, so that the threshold changes with each batch.

    Example:
        >>> from torch import nn
        >>> thresholds(nn.BatchNorm1d(3))
        tensor([0., 0., 0.])
    """
    mean, variance, gamma, beta = (getattr(norm, n, None) for n in ("running_mean", "running_var", "weight", "bias"))
    if mean is None or variance is None:
        raise ValueError(f"{type(norm).__name__} has no running statistics: its neurons have no fixed threshold")
    return _thresholds(mean, variance, gamma, beta, norm.eps)


def thresholds_of_call(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """Return the thresholds of a call of ``batch_norm``, ``None`` where it takes the statistics of the batch.

    Args:
        func: ``torch.nn.functional.batch_norm`` or ``torch.batch_norm``.
        args: its arguments.
        kwargs: its keyword arguments.
    """
    given = batch_norm_arguments(func, args, kwargs)
    mean, variance = given["running_mean"], given["running_var"]
    if given["training"] or mean is None or variance is None:
        return None
    return _thresholds(mean, variance, given["weight"], given["bias"], given["eps"])


def batch_norm_arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call of ``batch_norm`` by their names, with their defaults; see above."""
    given: dict[str, Any] = {"weight": None, "bias": None, "training": False, "eps": 1e-5}
    given |= dict(zip(_ORDER if func is F.batch_norm else _ORDER_OF_TORCH, args, strict=False))
    return {**given, **kwargs}


def _thresholds(mean: Tensor, variance: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    mean, variance = mean.detach(), variance.detach()
    gamma = torch.ones_like(mean) if gamma is None else gamma.detach()
    beta = torch.zeros_like(mean) if beta is None else beta.detach()
    threshold: Tensor = mean - beta * (variance + eps).sqrt() / gamma
    always = torch.where(beta >= 0, -torch.inf, torch.inf).to(threshold)
    return torch.where(gamma == 0, always, threshold)
