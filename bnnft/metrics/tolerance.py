"""Margins, importance and class margin of a model over a data set, as a table by layer."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric

from bnnft.injection.sites import Weights
from bnnft.metrics.found import named_blocks
from bnnft.metrics.meter import Meter
from bnnft.tracing.state import unchanged

_SHOWN: tuple[str, ...] = ("margin", "margin_normalized", "margin_below_2", "class_margin")
_SHOWN += ("importance", "importance_cv", "importance_cv_error", "estimator")


class ToleranceTable(dict[str, dict[str, Any]]):
    """What was measured, by layer and metric; prints the main numbers as a table.

    Attributes:
        left_out: what was not measured, and why.
    """

    def __init__(self, layers: Mapping[str, Mapping[str, Any]], left_out: Mapping[str, str]) -> None:
        super().__init__({layer: dict(values) for layer, values in layers.items()})
        self.left_out = dict(left_out)

    def __str__(self) -> str:
        names = [name for name in _SHOWN if any(name in values for values in self.values())]
        rows = [["layer", *names]]
        rows += [[layer, *(_shown(values.get(name, "")) for name in names)] for layer, values in self.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"{what}: {reason}" for what, reason in self.left_out.items())])


def sample_cross_entropies(model: nn.Module, batch: Any) -> Tensor:
    """Return the cross entropy of each sample of a batch ``(inputs, targets)``, shape (N,)."""
    inputs, targets = batch
    return cross_entropy(model(inputs), targets, reduction="none")


def tolerance(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], Tensor] = sample_cross_entropies,
    metrics: Sequence[Metric] | None = None,
    weights: Weights | None = None,
    chains: Mapping[str, Sequence[str | None]] | None = None,
) -> ToleranceTable:
    """Measure what predicts bit error tolerance: margins, importance and class margin by layer, without any flips.

    Args:
        model: any module with binarized weights; it runs in eval mode, and is left as it is.
        dataloader: yields batches, which are moved to the device of the weights.
        loss: ``loss(model, batch)`` runs the model on a batch and returns one value a sample, or the batch's mean; the
            cross entropy of ``(inputs, targets)`` if it is not given.
        metrics: of :mod:`bnnft.metrics` or your own; ``Margin``, ``ImportanceVariance`` and ``ClassMargin`` if
            ``None``.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.
        chains: for layers whose neurons are not found, or wrongly: ``{layer: [norm or None, activation]}``.

    Returns:
        Numbers by layer and metric, with :class:`bnnft.metrics.Histogram` objects, one importance a neuron, and the
        ``estimator`` of the importance, which by gradient is a surrogate before the last hidden layer. What could not
        be measured is left out, with a warning.

    Raises:
        ValueError: ``weights`` or ``chains`` match nothing, or there is no batch.

    Source: arXiv 2102.01344; see the metrics.

    Example:
        >>> from bnnft.nn import BinaryActivation, BinaryLinear
        >>> model = nn.Sequential(BinaryLinear(8, 6), nn.BatchNorm1d(6), BinaryActivation(), BinaryLinear(6, 3))
        >>> table = tolerance(model, [(torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))])
        >>> sorted(table["3"])[:2], table["0"]["margin"] > 0
        (['class_margin', 'class_margin_histogram'], True)
    """
    meter = Meter(model, metrics, weights, named_blocks(model, chains or {}))
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    batches = 0
    with unchanged(model):  # its training modes too, and what the loader draws when it starts
        model.eval()
        for batch in dataloader:
            moved = tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
            with torch.no_grad(), unchanged(model), meter.watch():
                loss(model, moved)
            meter.importance(partial(loss, model, moved))
            batches += 1
    if not batches:
        raise ValueError("tolerance needs data, but got no batch")
    results = meter.results()
    for remark in meter.remarks():
        warnings.warn(f"tolerance {remark}", stacklevel=2)
    estimators = {layer: {"estimator": e} if (e := meter.layers[layer].estimator) else {} for layer in results}
    table = {layer: _plain(values) | estimators[layer] for layer, values in results.items()}
    return ToleranceTable(table, meter.left_out)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    single = {name: isinstance(value, Tensor) and value.numel() == 1 for name, value in values.items()}
    return {name: float(value) if single[name] else value for name, value in values.items()}
