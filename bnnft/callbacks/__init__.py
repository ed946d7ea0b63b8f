"""Lightning callbacks that flip bits in training, measure tolerance, and keep checkpoints whole."""

from bnnft.callbacks.accuracy_over_ber import AccuracyOverBER
from bnnft.callbacks.bit_flip_training import BitFlipTraining
from bnnft.callbacks.checkpoint import Checkpoint
from bnnft.callbacks.compensation import Compensation
from bnnft.callbacks.latent_clamp import LatentClamp
from bnnft.callbacks.objective import Objective
from bnnft.callbacks.predicted_accuracy_over_ber import PredictedAccuracyOverBER
from bnnft.callbacks.progress_bar import ProgressBar
from bnnft.callbacks.tolerance_metrics import ToleranceMetrics

__all__ = ["AccuracyOverBER", "BitFlipTraining", "Checkpoint", "Compensation", "LatentClamp", "Objective"]
__all__ += ["PredictedAccuracyOverBER", "ProgressBar", "ToleranceMetrics"]
