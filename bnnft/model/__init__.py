"""Networks as plain modules: ``Network(input_shape, num_classes, ...)``."""

from bnnft.model.fc import FC
from bnnft.model.vgg3 import VGG3

__all__ = ["FC", "VGG3"]
