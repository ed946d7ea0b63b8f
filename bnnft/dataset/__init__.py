"""Data sets as LightningDataModules that know their ``input_shape`` and ``num_classes``."""

from bnnft.dataset.digits import Digits
from bnnft.dataset.fashion_mnist import FashionMNIST

__all__ = ["Digits", "FashionMNIST"]
