"""Which dimension of a tensor is that of a layer's neurons, wherever reshaping has put it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bnnft.tracing.trace import Node

RESHAPING = {"view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "movedim", "squeeze", "unsqueeze"}
RESHAPING |= {"getitem", "swapaxes", "moveaxis", "view_as", "reshape_as", "narrow", "chunk", "split", "expand"}


class Axis(NamedTuple):
    """The dimension of the neurons in tensors of samples.

    Attributes:
        dim: its number.
        neurons: how many there are; the dimension may be a multiple of that, if positions were flattened into it.
        minor: neurons vary faster than the positions in the same dimension.
    """

    dim: int
    neurons: int
    minor: bool = False

    def fits(self, tensor: Tensor) -> bool:
        """Return whether a tensor has such a dimension."""
        return self.dim < tensor.dim() and tensor.shape[self.dim] % self.neurons == 0

    def spread(self, tensor: Tensor) -> Tensor:
        r"""Return a tensor as shape (N, neurons, \*positions), a view where it can be one.

        Example:
            >>> Axis(2, 3).spread(torch.zeros(5, 7, 3)).shape
            torch.Size([5, 3, 7])
        """
        tensor = tensor.movedim(self.dim, 1)
        positions = tensor.shape[1] // self.neurons
        if positions == 1:
            return tensor
        shape = (positions, self.neurons) if self.minor else (self.neurons, positions)
        tensor = tensor.unflatten(1, shape)  # type: ignore[no-untyped-call]
        return tensor.movedim(2, 1) if self.minor else tensor

    def scaled(self, tensor: Tensor, neuron: int, factor: float) -> Tensor:
        """Return a copy of a tensor with the values of one neuron multiplied by a factor.

        Example:
            >>> Axis(1, 2).scaled(torch.ones(1, 4), 1, -1.0)
            tensor([[ 1.,  1., -1., -1.]])
        """
        size = tensor.shape[self.dim]
        places = torch.arange(size, device=tensor.device)
        of_neurons = places % self.neurons if self.minor else places // (size // self.neurons)
        chosen = (of_neurons == neuron).nonzero().squeeze(1)
        changed = tensor.clone()
        changed.index_copy_(self.dim, chosen, tensor.index_select(self.dim, chosen) * factor)
        return changed


def numbered(value: Tensor, convolution: bool) -> Tensor:
    """Return a tensor in the shape of a linear map's result that holds the number of each value's neuron."""
    dim = 1 if convolution else value.dim() - 1
    shape = [-1 if place == dim else 1 for place in range(value.dim())]
    return (
        torch.arange(value.shape[dim], device=value.device, dtype=torch.float32)
        .view(shape)
        .expand(value.shape)
        .contiguous()
    )


def carried(node: Node, given: int, made: int, numbers: Tensor | None, values: Sequence[Tensor]) -> Tensor | None:
    """Return the numbers of neurons after an operation, from those before it; ``None`` where they are not known."""
    shape = values[made].shape
    if numbers is not None and (node.operation in RESHAPING or "pool" in node.operation) and node.call is not None:
        return node.run(lambda value: numbers if value == given else values[value])[made]
    return numbers if numbers is not None and numbers.shape == shape else None


def axis_of(numbers: Tensor | None, neurons: int) -> Axis | None:
    """Return the dimension of neurons in a tensor, given the number of each value's neuron.

    Example:
        >>> axis_of(torch.tensor([[0, 0, 1, 1]]), neurons=2)
        Axis(dim=1, neurons=2, minor=False)
        >>> axis_of(torch.tensor([[0, 1, 0, 1]]), neurons=2)
        Axis(dim=1, neurons=2, minor=True)
    """
    if numbers is None:
        return None
    for dim in range(1, numbers.dim()):
        size = numbers.shape[dim]
        places = torch.arange(size, device=numbers.device)
        lines = numbers.movedim(dim, 0).flatten(1)
        for minor in (False, True):
            if size % neurons == 0:
                expected = places % neurons if minor else places // (size // neurons)
                if bool((lines == expected[:, None]).all()):
                    return Axis(dim, neurons, minor)
    return None
