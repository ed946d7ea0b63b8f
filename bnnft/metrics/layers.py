"""What is measured of each binarized layer, and what it offers to metrics."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple

from torch import Tensor
from torchmetrics import Metric

from bnnft.tracing.blocks import Block, Observation


class Layer(NamedTuple):
    """One binarized layer that is measured.

    Attributes:
        block: its batch norm and neurons.
        fan_in: number of weights of one output neuron.
        scale: half of what a flip moves each output neuron by; ``None`` if it is 1 for all.
        metrics: that take in what it offers, by their place among those that were asked for.
    """

    block: Block
    fan_in: int
    scale: Tensor | None
    metrics: dict[int, Metric]

    @classmethod
    def of(cls, block: Block, fan_in: int, scale: Tensor | None, metrics: Sequence[Metric]) -> "Layer":
        """Return a layer with copies of the metrics whose ``update`` asks for what it offers."""
        offers = {"importance"} if block.has_outputs else set()
        if not block.reason:
            offers |= {"scores", "fan_in"} if block.last else {"preactivations", "thresholds", "fan_in"}
        chosen = {number: metric.clone() for number, metric in enumerate(metrics) if asked(metric) <= offers}
        return cls(block, fan_in, scale, chosen)

    @property
    def importances(self) -> list[Any]:
        """The metrics that take in importance."""
        return [metric for metric in self.metrics.values() if "importance" in asked(metric)]

    def importance(self, estimator: str) -> Metric | None:
        """Return the metric that takes in importance by an estimator, if there is one."""
        return next((metric for metric in self.importances if metric.estimator == estimator), None)

    @property
    def estimator(self) -> str:
        """How importance was measured, empty if it was not."""
        estimator = next((str(metric.estimator) for metric in self.importances if metric.update_called), "")
        return f"{estimator} (surrogate)" if estimator == "gradient" and self.block.surrogate else estimator

    @property
    def others(self) -> list[Metric]:
        """The metrics that take in what a forward shows."""
        return [metric for metric in self.metrics.values() if "importance" not in asked(metric)]


def checked_metrics(metrics: Sequence[Metric]) -> list[Metric]:
    """Return metrics as a list.

    Raises:
        TypeError: one is no metric.
        ValueError: two of one class, whose results would have the same names.
    """
    if wrong := [metric for metric in metrics if not isinstance(metric, Metric)]:
        raise TypeError(f"metrics must be torchmetrics metrics, got {wrong[0]!r}")
    kinds = [type(metric).__name__ for metric in metrics]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise ValueError(f"metrics must be of different classes, got {kind} {kinds.count(kind)} times")
    return list(metrics)


def asked(metric: Metric) -> set[str]:
    """Return the names of the arguments of a metric's ``update``."""
    return set(signature(metric.update).parameters)


def update(metric: Metric, values: Mapping[str, Any]) -> None:
    """Let a metric take in what it asks for, on the device where that is."""
    device = next(value.device for value in values.values() if isinstance(value, Tensor))
    metric.to(device).update(**{name: values[name] for name in asked(metric)})


def streams(layer: Layer, seen: Observation, left_out: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yield what each run of a layer offers to its metrics.

    Args:
        layer: that ran.
        seen: what was observed of it.
        left_out: where to note why a run offers nothing.
    """
    name, scale = layer.block.layer, layer.scale
    for values, threshold in zip(seen.preactivations, seen.thresholds, strict=True):
        if layer.block.reason:
            return
        if layer.block.last and (values.dim() != 2 or values.shape[1] < 2):
            shape = tuple(values.shape)
            left_out.setdefault(f"class margin of {name}", f"its outputs have shape {shape}, not (N, classes)")
        elif layer.block.last and scale is not None and not bool((scale == scale[0]).all()):
            left_out.setdefault(f"class margin of {name}", "its classes have scales of their own")
        elif threshold is None:
            left_out.setdefault(f"margins of {name}", "its batch norm takes the statistics of each batch")
        elif values.numel():
            if scale is not None:
                # a flip moves the neuron by twice the layer's scale: in units of the scale it is what it is without
                values = values / scale.view(-1, *[1] * (values.dim() - 2))
                threshold = threshold / scale
            numbers = {"scores": values} if layer.block.last else {"preactivations": values, "thresholds": threshold}
            yield {**numbers, "fan_in": layer.fan_in}


def computed(layer: Layer) -> dict[str, Any]:
    """Return what the metrics of a layer compute, without numbers that are not defined."""
    values: dict[str, Any] = {}
    for metric in layer.metrics.values():
        with warnings.catch_warnings():  # torchmetrics warns where this process had no data
            warnings.simplefilter("ignore")
            result = metric.compute()
            values |= result if isinstance(result, dict) else {type(metric).__name__: result}
    return {key: value for key, value in values.items() if not _undefined(value)}


def _undefined(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and bool(value.isnan())
