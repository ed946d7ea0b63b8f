"""The Lightning layer: when to inject, measure, clamp and save."""

from bnnft.callbacks.accuracy_over_ber import AccuracyOverBER
from bnnft.callbacks.bit_flip_training import BitFlipTraining
from bnnft.callbacks.checkpoint import Checkpoint
from bnnft.callbacks.latent_clamp import LatentClamp
from bnnft.callbacks.objective import Objective
from bnnft.callbacks.tolerance_metrics import ToleranceMetrics

__all__ = ["AccuracyOverBER", "BitFlipTraining", "Checkpoint", "LatentClamp", "Objective", "ToleranceMetrics"]
