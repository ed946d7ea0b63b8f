"""Bit error tolerance of binarized neural networks, for PyTorch and Lightning."""

from importlib.metadata import version

from bnnft.evaluation.accuracy import accuracy_over_ber
from bnnft.evaluation.curve import BERCurve
from bnnft.injection.finder import find_binarized_weights
from bnnft.injection.flipped import flipped
from bnnft.injection.sites import binarized_weights

__version__ = version("bnnft")
__all__ = ["BERCurve", "accuracy_over_ber", "binarized_weights", "find_binarized_weights", "flipped"]
