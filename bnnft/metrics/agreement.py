"""How the processes of a distributed run agree on what they have measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torchmetrics import Metric

from bnnft.metrics.layers import Layer
from bnnft.tracing.blocks import Block


def agree(
    layers: Mapping[str, Layer], left_out: Mapping[str, str], metrics: Sequence[Metric]
) -> tuple[dict[str, Layer], dict[str, str]]:
    """Return layers with the same metrics in the same order on every process, empty ones where a process had no data.

    Args:
        layers: of this process.
        left_out: of this process.
        metrics: that were asked for.

    Returns:
        The layers, and what was left out on any process.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return dict(layers), dict(left_out)
    own = {
        name: {number: _shapes(metric) for number, metric in layer.metrics.items()} for name, layer in layers.items()
    }
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, (own, dict(left_out)))
    agreed: dict[str, Layer] = {}
    for shapes, _ in everyone:
        for name, states in shapes.items():
            layer = agreed.setdefault(name, layers.get(name, Layer(Block(name), 0, None, {})))
            for number, shape in states.items():
                metric = layer.metrics.setdefault(number, metrics[number].clone())
                _widen(metric, shape)
    agreed = {n: each._replace(metrics=dict(sorted(each.metrics.items()))) for n, each in agreed.items()}
    return agreed, {what: reason for _, reasons in reversed(everyone) for what, reason in reasons.items()}


def _shapes(metric: Metric) -> dict[str, tuple[int, ...]]:
    return {name: tuple(state.shape) for name, state in metric.metric_state.items() if isinstance(state, Tensor)}


def _widen(metric: Metric, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give the empty states of a metric the shapes that they have where there was data."""
    for name, shape in shapes.items():
        state = getattr(metric, name)
        if state.dim() < len(shape):
            setattr(metric, name, state.new_zeros(shape))
