"""Fully connected binarized network."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from bnnft.nn import BinaryActivation, BinaryLinear, Scale


class FC(nn.Sequential):
    """Binarized linear layers, each but the last followed by batch norm and sign; learned scale on the scores.

    The first layer sees real-valued inputs. No layer has a bias: the batch norm has one.

    Args:
        input_shape: of one sample, without the batch dimension; it is flattened.
        num_classes: number of class scores.
        widths: neurons of the hidden layers.

    Shapes: input ``(N, *input_shape)``, output ``(N, num_classes)``.

    Raises:
        TypeError, ValueError: the widths are no list, or a size is below 1.

    Source: the fully connected networks of arXiv 2102.01344 and 2002.00909.

    Example:
        >>> import torch
        >>> FC((1, 28, 28), 10, widths=[64, 32]).eval()(torch.ones(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, widths: Sequence[int] = (1024, 1024)) -> None:
        given: Any = widths
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise TypeError(f"widths must be a list with the neurons of each hidden layer, got {widths!r}")
        sizes = [math.prod(input_shape), *widths, num_classes]
        if min(sizes) < 1:
            raise ValueError(
                f"input_shape, num_classes and widths must be at least 1, got {list(input_shape)}, {num_classes}, "
                f"{list(widths)}"
            )
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for number, (inputs, outputs) in enumerate(pairwise(sizes[:-1]), 1):
            layers[f"fc{number}"] = BinaryLinear(inputs, outputs, bias=False)
            layers[f"norm{number}"] = nn.BatchNorm1d(outputs)
            layers[f"sign{number}"] = BinaryActivation()
        layers[f"fc{len(sizes) - 1}"] = BinaryLinear(sizes[-2], num_classes, bias=False)
        layers["scale"] = Scale(1 / math.sqrt(sizes[-2]))
        super().__init__(layers)
