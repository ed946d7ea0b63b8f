"""Small binarized convolutional network."""

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from bnnft.nn import BinaryActivation, BinaryConv2d, BinaryLinear, Scale


class VGG3(nn.Sequential):
    """Two binarized 3x3 convolutions with max-pooling, one hidden linear layer and the output layer.

    In each block pooling comes before batch norm and sign, so the pre-activation is the pooled value.

    Args:
        input_shape: (channels, height, width) of one sample, height and width at least 4.
        num_classes: number of class scores.
        channels: of both convolutions.
        width: neurons of the hidden linear layer.

    Shapes: input ``(N, *input_shape)``, output ``(N, num_classes)``.

    Raises:
        ValueError: the shape does not fit, or a size is below 1.

    Source: the network VGG3 of Buschjaeger et al., DATE 2021 (C64, MP2, C64, MP2, FC2048, FC10).

    Example:
        >>> import torch
        >>> VGG3((1, 28, 28), 10, channels=8, width=32).eval()(torch.ones(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, channels: int = 64, width: int = 2048) -> None:
        if len(input_shape) != 3 or min(input_shape[1:]) < 4 or input_shape[0] < 1:
            raise ValueError(
                "input_shape must be (channels, height, width) with at least one channel and height and width of at "
                f"least 4, got {list(input_shape)}"
            )
        if min(num_classes, channels, width) < 1:
            raise ValueError(
                f"num_classes, channels and width must be at least 1, got {num_classes}, {channels}, {width}"
            )
        depth, height, across = input_shape
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, inputs in enumerate((depth, channels), 1):
            layers[f"conv{number}"] = BinaryConv2d(inputs, channels, 3, padding=1, bias=False)
            layers[f"pool{number}"] = nn.MaxPool2d(2)
            layers[f"norm{number}"] = nn.BatchNorm2d(channels)
            layers[f"sign{number}"] = BinaryActivation()
        layers["flatten"] = nn.Flatten()
        layers["fc1"] = BinaryLinear(channels * (height // 4) * (across // 4), width, bias=False)
        layers["norm3"] = nn.BatchNorm1d(width)
        layers["sign3"] = BinaryActivation()
        layers["fc2"] = BinaryLinear(width, num_classes, bias=False)
        layers["scale"] = Scale(1 / math.sqrt(width))
        super().__init__(layers)
