"""Correct the sums of a model's layers while it runs, and let its batch norms use other statistics."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnnft.compensation.plan import CONVOLUTIONS, MAPS
from bnnft.tracing.mode import ModuleMode
from bnnft.tracing.thresholds import batch_norm_arguments
from bnnft.tracing.tracking import operation_name


class Correction(NamedTuple):
    """What errors do to the sums with one weight, on average: ``left * s + shift * sum(x)``.

    Attributes:
        size: of the weight, in elements.
        left: of a sum, in (0, 1] in most cases; 1 where sums are not scaled.
        shift: by the sum of the inputs.
        scaled: the two values of each neuron's weights are not -1 and 1.
    """

    size: int
    left: float
    shift: float
    scaled: bool = False


class Statistics:
    """Mean and variance of what a batch norm is given, for each channel, over some batches."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros(())
        self._squares: Tensor = torch.zeros(())  # sum of squared distances from the mean

    def take(self, values: Tensor) -> None:
        """Take in a batch, shape (N, channels, ...)."""
        flat = values.detach().transpose(0, 1).flatten(1).double()
        count, mean = flat.shape[1], flat.mean(1)
        total, distance = self.count + count, mean - self.mean.to(mean)
        squares = (flat - mean[:, None]).square().sum(1)
        self._squares = self._squares.to(mean) + squares + distance.square() * (self.count * count / total)
        self.mean = self.mean.to(mean) + distance * (count / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """Without bias, as of running statistics."""
        return self._squares / max(self.count - 1, 1)


class Corrections(ModuleMode):
    """Corrects sums as they are made, while active; nothing is written to the model.

    Args:
        model: that is to run.
        corrections: for each layer's name those of its weights.
        statistics: for batch norms' names, which they are to use instead of their own.
        gather: names of batch norms that are to normalize by the batch; their statistics are taken into
            ``statistics``.
    """

    def __init__(
        self,
        model: nn.Module,
        corrections: Mapping[str, Sequence[Correction]],
        statistics: dict[str, Statistics],
        gather: Sequence[str] = (),
    ) -> None:
        super().__init__(model)
        self._corrections, self._statistics, self._gather = corrections, statistics, frozenset(gather)

    def begin_in(self, name: str) -> None:
        """Take note that a module runs already, whose start was not seen."""
        self._enter_module(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, place, operation = kwargs or {}, self.place, operation_name(func)
        if operation == "batch_norm" and (place in self._gather or place in self._statistics):
            return self._normed(func, args, kwargs)
        result = func(*args, **kwargs)
        if place in self._corrections and operation in MAPS and len(args) > 1:
            with torch._C.DisableTorchFunction():  # our own operations are nobody's business
                for correction in self._corrections[place]:
                    if args[1].numel() == correction.size:
                        return corrected(correction, operation, func, args, kwargs, result)
        return result

    def _normed(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = batch_norm_arguments(func, args, kwargs)
        values = given["input"]
        if self.place in self._gather:
            with torch._C.DisableTorchFunction():
                self._statistics.setdefault(self.place, Statistics()).take(values)
                if values.numel() // values.shape[1] < 2:
                    raise ValueError(f"recalibration of {self.place} needs two or more values a channel in each batch")
            return F.batch_norm(values, None, None, given["weight"], given["bias"], True, 0.0, given["eps"])
        own, other = given["running_mean"], self._statistics[self.place]
        if own is None or own.shape != other.mean.shape:
            shape = None if own is None else tuple(own.shape)
            raise ValueError(f"statistics of {self.place} have shape {tuple(other.mean.shape)}, it has {shape}")
        mean, variance = other.mean.to(own), other.variance.to(own)
        return F.batch_norm(values, mean, variance, given["weight"], given["bias"], False, 0.0, given["eps"])


def corrected(
    correction: Correction, operation: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor
) -> Tensor:
    """Return the result of a linear map as it would be without errors, on average.

    Args:
        correction: of the weight.
        operation: name of the map.
        func: that has run.
        args: its arguments: inputs, weight, and what else it takes.
        kwargs: its keyword arguments.
        result: of it.

    Example:
        >>> x, weight = torch.ones(1, 4), torch.tensor([[1.0, 1.0, 1.0, -1.0]])
        >>> half_wrong = torch.tensor([[1.0, 1.0, 1.0, 1.0]])  # a stored 0 always reads 1: left 0.5 - 0.5, shift 0.5
        >>> corrected(Correction(4, 0.5, 0.5), "linear", F.linear, (x, half_wrong), {}, F.linear(x, half_wrong))
        tensor([[4.]])
    """
    inputs, weight, *rest = args
    bias = kwargs.get("bias", rest[0] if rest and operation not in ("matmul", "mm") else None)
    channels = (-1, *[1] * (result.dim() - 2 if operation in CONVOLUTIONS and result.dim() == weight.dim() else 0))
    if operation in CONVOLUTIONS and result.dim() < weight.dim():  # one sample without a batch dimension
        channels = (-1, *[1] * (result.dim() - 1))
    added = 0 if bias is None else bias.view(channels)
    sums = result - added
    if correction.shift:
        sums = sums - correction.shift * _input_sums(
            correction, operation, func, inputs, weight, rest, kwargs, channels
        )
    return (sums / correction.left + added).to(result.dtype)


def _input_sums(
    correction: Correction,
    operation: str,
    func: Any,
    inputs: Tensor,
    weight: Tensor,
    rest: Sequence[Any],
    kwargs: Mapping[str, Any],
    channels: Sequence[int],
) -> Tensor:
    """Return the sum of the inputs of each neuron, times half the distance of its weights' two values."""
    if operation in CONVOLUTIONS:
        groups = kwargs.get("groups", rest[4] if len(rest) > 4 else 1)
        ones = torch.ones((groups, *weight.shape[1:]), dtype=inputs.dtype, device=inputs.device)
        other = {name: value for name, value in kwargs.items() if name != "bias"}
        sums: Tensor = func(inputs, ones, None, *rest[1:], **other)
        if groups > 1:
            sums = sums.repeat_interleave(len(weight) // groups, dim=-len(channels))
    else:
        sums = inputs.sum(-1, keepdim=True)
    if not correction.scaled:
        return sums
    rows = weight.detach() if operation in ("linear", *CONVOLUTIONS) else weight.detach().movedim(-1, 0)
    return sums * rows.flatten(1)[:, 0].abs().view(channels)
