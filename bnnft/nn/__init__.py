"""Binarized building blocks: sign with a straight-through gradient, and the layers made of it."""

from bnnft.nn.binarize import binarize
from bnnft.nn.layers import BinaryActivation, BinaryConv2d, BinaryLinear, Scale

__all__ = ["BinaryActivation", "BinaryConv2d", "BinaryLinear", "Scale", "binarize"]
