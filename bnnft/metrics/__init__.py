"""What is measured of a binarized network's neurons, as torchmetrics.

A metric takes part in :class:`bnnft.callbacks.ToleranceMetrics` by the names of its ``update`` arguments:
``preactivations``, ``thresholds``, ``fan_in`` and ``importance`` of a hidden layer, ``scores`` of the last one.
"""

from bnnft.metrics.class_margin import ClassMargin, class_margin
from bnnft.metrics.histogram import Histogram
from bnnft.metrics.importance import neuron_importance
from bnnft.metrics.importance_variance import ImportanceVariance, importance_variance
from bnnft.metrics.margin import Margin, margin

__all__ = [
    "ClassMargin",
    "Histogram",
    "ImportanceVariance",
    "Margin",
    "class_margin",
    "importance_variance",
    "margin",
    "neuron_importance",
]
