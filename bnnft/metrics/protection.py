"""Which neurons are worth cells that do not fail: scores of neurons for :class:`bnnft.ber.Protected`."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from bnnft.ber import checked_choice
from bnnft.injection.sites import binarized_weights
from bnnft.metrics.importance import Estimator
from bnnft.metrics.importance_variance import ImportanceVariance
from bnnft.metrics.tolerance import sample_cross_entropies, tolerance

By = Literal["importance", "margin"]


class _NearThresholds(Metric):
    """Share of samples and positions for which each neuron is near its threshold, by standard deviations of flips."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preactivations: Tensor, thresholds: Tensor, fan_in: int) -> None:
        sums = preactivations.detach().double().transpose(0, 1).flatten(1)
        limits = torch.as_tensor(thresholds, dtype=sums.dtype, device=sums.device).reshape(-1, 1)
        # how likely a flip in every tenth bit is to turn the neuron, about
        distance = (sums - limits).abs() / (0.6 * fan_in**0.5)
        self.total = self.total + torch.special.ndtr(-distance).sum(1)
        self.count = self.count + sums.shape[1]

    def compute(self) -> dict[str, Tensor]:
        return {"near": self.total / self.count}


def protection_scores(
    model: nn.Module,
    dataloader: Iterable[Any],
    by: By = "importance",
    *,
    estimator: Estimator = "gradient",
    loss: Callable[[nn.Module, Any], Tensor] = sample_cross_entropies,
) -> dict[str, Tensor]:
    """Return for each binarized weight how much each of its neurons is worth protecting, the highest first.

    Neurons of the last layer have neither importance nor margin, and get no scores.

    Args:
        model: any module with layers that are known to be binarized.
        dataloader: yields batches.
        by: ``"importance"``, how much the loss depends on a neuron's output; or ``"margin"``, how often it is near its
            threshold, so that few flips turn it.
        estimator: of importance, see :func:`bnnft.metrics.neuron_importance`.
        loss: see :func:`bnnft.tolerance`.

    Raises:
        ValueError: no such criterion; the model has no such weights; no neuron could be measured.

    Example:
        >>> from bnnft.nn import BinaryActivation, BinaryLinear
        >>> model = nn.Sequential(BinaryLinear(8, 6), nn.BatchNorm1d(6), BinaryActivation(), BinaryLinear(6, 3))
        >>> scores = protection_scores(model, [(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))])
        >>> {name: tuple(values.shape) for name, values in scores.items()}
        {'0.weight': (6,)}
    """
    checked_choice(by, By, "by")
    metric, key = (
        (ImportanceVariance(estimator), "neuron_importance") if by == "importance" else (_NearThresholds(), "near")
    )
    table = tolerance(model, dataloader, loss=loss, metrics=[metric])
    weights = {name.rpartition(".")[0]: name for name in binarized_weights(model)}
    scores = {
        weights[layer]: values[key].detach().cpu()
        for layer, values in table.items()
        if layer in weights and key in values
    }
    if not scores:
        raise ValueError(f"no neuron of {type(model).__name__} has a score by {by}: {table.left_out}")
    return scores
