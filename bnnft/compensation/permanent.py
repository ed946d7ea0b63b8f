"""Compensate a model for good, by its batch norms alone."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from bnnft.ber import ErrorModel, as_error_model, checked_bit_rates
from bnnft.compensation.compensator import Compensator
from bnnft.compensation.method import Method
from bnnft.compensation.plan import Layer, Plan
from bnnft.injection.gathered import take_down
from bnnft.injection.sites import Weights, known_sites
from bnnft.nn import BinaryActivation


@torch.no_grad()
def compensate(
    model: nn.Module,
    error_model: float | ErrorModel,
    *inputs: Any,
    gathered_at: float | ErrorModel | None = None,
    weights: Weights | None = None,
) -> None:
    """Scale the thresholds of a model for a memory's errors, for good: a change of batch norms' statistics alone.

    A plain checkpoint holds it. The rates are taken down at the layers, so that a later call starts from them; a state
    dict does not hold that.

    Args:
        model: any module with binarized weights, in eval mode.
        error_model: a symmetric bit error rate in [0, 1], or an error model whose zeros and ones have equal rates.
        inputs: an example of what the model takes, to see which batch norm stands behind which layer; not needed for an
            ``nn.Sequential`` of such, where the order says it.
        gathered_at: rate or error model that the statistics were gathered at, see
            :class:`bnnft.compensation.Method`.
        weights: patterns or a function that select weights, see :func:`bnnft.binarized_weights`.

    Raises:
        TypeError, ValueError: an argument is out of range; something else than batch norms would have to change, or
            there is none behind a hidden layer.

    Example:
        >>> from bnnft.nn import BinaryActivation, BinaryLinear
        >>> hidden = BinaryLinear(8, 4, bias=False), nn.BatchNorm1d(4), BinaryActivation()
        >>> model = nn.Sequential(*hidden, BinaryLinear(4, 2, bias=False)).eval()
        >>> model[1].running_mean += 10
        >>> compensate(model, 0.1, torch.ones(1, 8))
        >>> model[1].running_mean, model[1].running_var
        (tensor([8., 8., 8., 8.]), tensor([0.6400, 0.6400, 0.6400, 0.6400]))
    """
    error_model, method = as_error_model(error_model), Method("thresholds", gathered_at=gathered_at)
    compensator = Compensator(model, method, weights)
    if inputs:
        compensator.look(lambda: model(*inputs))
    else:
        compensator.plan = _plan_of_sequence(model, weights)
    assert compensator.plan is not None
    changes = []
    for layer in compensator.plan.layers:
        rates = checked_bit_rates(error_model, layer.site.name)
        left = compensator.left(layer, error_model)
        if shift := compensator.shift(layer, error_model):
            raise ValueError(
                f"compensation of {layer.name} can't be permanent: at rates {rates} its sums are shifted by "
                f"{shift:.3g} times the sum of each sample's inputs, which no batch norm knows. Use compensated()"
            )
        if left == 1:
            continue
        if fault := _fault(layer):
            raise ValueError(f"compensation of {layer.name} can't be permanent: {fault}. Use compensated()")
        changes.append((layer, left, rates))
    for layer, left, rates in changes:  # after all checks: all or nothing
        if layer.norm:
            _scale(model, layer, left)
        take_down(model, {layer.site.name: rates})


def _fault(layer: Layer) -> str:
    """Return why scaling the thresholds of a layer is no change of its batch norm alone, nothing if it is."""
    if layer.last:
        return "its class scores have a bias" if layer.bias else ""  # the order of the scores stays
    if not layer.norm:
        return "there is no batch norm between its sums and its neurons" if layer.bias or layer.reason else ""
    return layer.reason


def _scale(model: nn.Module, layer: Layer, left: float) -> None:
    norm: Any = model.get_submodule(layer.norm)
    bias: Any = getattr(model.get_submodule(layer.name), "bias", None) if layer.bias else None
    bias = 0 if bias is None else bias
    norm.running_mean.sub_(bias).mul_(left).add_(bias)
    # so that sqrt(variance + eps) is scaled, as far as a variance can be
    norm.running_var.add_(norm.eps).mul_(left**2).sub_(norm.eps).clamp_(min=0)


def _plan_of_sequence(model: nn.Module, weights: Weights | None) -> Plan:
    """Return the plan of modules that run one after the other, without a forward.

    Raises:
        ValueError: the model is no ``nn.Sequential`` of such.
    """
    parts = list(_leaves(model, ""))
    sites = {site.layer: site for site in known_sites(model, weights)}
    if not isinstance(model, nn.Sequential) or not sites.keys() <= {name for name, _ in parts}:
        raise ValueError(
            f"{type(model).__name__} is no nn.Sequential, whose order says which batch norm stands behind which layer: "
            "give an example of its inputs, compensate(model, rate, inputs)"
        )
    layers = list[Layer]()
    for name, part in parts:
        if name in sites:
            bias = getattr(part, "bias", None) is not None
            layers.append(Layer(name, sites[name], bias=bias, last=True))  # until something follows
        elif layers:
            layer = layers[-1]
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and not layer.norm and layer.last:
                if part.running_mean is None:
                    raise ValueError(f"thresholds of {layer.name} can't be scaled: {name} has no running statistics")
                layers[-1] = layer._replace(norm=name, last=False)
            elif isinstance(part, BinaryActivation):
                layers[-1] = layer._replace(last=False)
    return Plan(tuple(layers), (), {}, {})


def _leaves(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Sequential):
        yield name, module
        return
    for child, part in module.named_children():
        yield from _leaves(part, f"{name}.{child}" if name else child)
