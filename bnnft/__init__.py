"""Bit error tolerance of binarized neural networks, for PyTorch and Lightning."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnnft.compensation import compensate, compensated
    from bnnft.evaluation.accuracy import accuracy_over_ber
    from bnnft.evaluation.curve import BERCurve
    from bnnft.evaluation.prediction import predict_accuracy_over_ber, predicted_accuracy
    from bnnft.injection.flipped import flipped
    from bnnft.injection.look import find_binarized_weights
    from bnnft.injection.sites import binarized_weights
    from bnnft.metrics.protection import protection_scores
    from bnnft.metrics.tolerance import tolerance

__version__ = version("bnnft")
__all__ = ["BERCurve", "accuracy_over_ber", "binarized_weights", "compensate", "compensated", "find_binarized_weights"]
__all__ += ["flipped", "predict_accuracy_over_ber", "predicted_accuracy", "protection_scores", "tolerance"]

_MODULES = {
    "BERCurve": "evaluation.curve",
    "accuracy_over_ber": "evaluation.accuracy",
    "binarized_weights": "injection.sites",
    "compensate": "compensation",
    "compensated": "compensation",
    "find_binarized_weights": "injection.look",
    "flipped": "injection.flipped",
    "predict_accuracy_over_ber": "evaluation.prediction",
    "predicted_accuracy": "evaluation.prediction",
    "protection_scores": "metrics.protection",
    "tolerance": "metrics.tolerance",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that a command answers without torch where it needs none."""
    if name in _MODULES:
        found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    else:
        try:
            found = import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
