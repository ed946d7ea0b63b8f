"""The Lightning layer: when to inject, measure and clamp."""

from bnnft.callbacks.accuracy_over_ber import AccuracyOverBER
from bnnft.callbacks.bit_flip_training import BitFlipTraining
from bnnft.callbacks.compensation import Compensation
from bnnft.callbacks.latent_clamp import LatentClamp
from bnnft.callbacks.predicted_accuracy_over_ber import PredictedAccuracyOverBER
from bnnft.callbacks.tolerance_metrics import ToleranceMetrics

__all__ = ["AccuracyOverBER", "BitFlipTraining", "Compensation", "LatentClamp", "PredictedAccuracyOverBER"]
__all__ += ["ToleranceMetrics"]
