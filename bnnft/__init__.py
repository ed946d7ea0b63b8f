"""Bit error tolerance of binarized neural networks, for PyTorch and Lightning."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from bnnft.compensation import compensate, compensated
from bnnft.evaluation.accuracy import accuracy_over_ber
from bnnft.evaluation.curve import BERCurve
from bnnft.evaluation.prediction import predict_accuracy_over_ber, predicted_accuracy
from bnnft.injection.flipped import flipped
from bnnft.injection.look import find_binarized_weights
from bnnft.injection.sites import binarized_weights

if TYPE_CHECKING:
    from bnnft.metrics.protection import protection_scores
    from bnnft.metrics.tolerance import tolerance

__version__ = version("bnnft")
__all__ = ["BERCurve", "accuracy_over_ber", "binarized_weights", "compensate", "compensated", "find_binarized_weights"]
__all__ += ["flipped", "predict_accuracy_over_ber", "predicted_accuracy", "protection_scores", "tolerance"]


def __getattr__(name: str) -> Any:
    if name == "tolerance":  # torchmetrics loads matplotlib: only where it is used
        from bnnft.metrics.tolerance import tolerance

        return tolerance
    if name == "protection_scores":
        from bnnft.metrics.protection import protection_scores

        return protection_scores
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
