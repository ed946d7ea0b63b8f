"""How much the loss depends on each neuron."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from bnnft.tracing.axis import Axis
from bnnft.tracing.blocks import Block
from bnnft.tracing.neurons import watch
from bnnft.tracing.replay import Replay
from bnnft.tracing.state import unchanged
from bnnft.tracing.trace import Trace

Estimator = Literal["gradient", "flip", "ablation"]
Loss = Callable[[], Tensor]


class Importance(NamedTuple):
    """What was measured of one batch.

    Attributes:
        values: importances by layer, shape (samples, neurons), in units of the loss.
        reasons: why there are none, by layer.
        moved: names of what the loss has moved in the model and what can't be put back.
    """

    values: dict[str, Tensor]
    reasons: dict[str, str]
    moved: list[str]


def neuron_importance(
    model: nn.Module, blocks: Mapping[str, Block], loss: Loss, estimator: Estimator = "gradient"
) -> dict[str, Tensor]:
    """Return how much the loss of each sample depends on each neuron's output bit.

    Args:
        model: in eval mode, without flips. What the loss changes in it is put back, see
            :func:`bnnft.tracing.state.unchanged`.
        blocks: by layer, with neuron outputs (see :mod:`bnnft.tracing.blocks`).
        loss: runs the model on a batch and returns its loss: one value a sample, or, for ``"gradient"`` only, the
            mean over the batch.
        estimator: ``"flip"``, ``|L(-a) - L(a)|``, is exact; ``"ablation"``, ``|L(0) - L(a)|``, likewise;
            ``"gradient"``, ``|sum over positions of 2 a dL/da|``, is the first-order effect of flipping the bit, one
            backward for all neurons. Before the last hidden layer it passes straight-through estimators and is a
            surrogate: it ranks neurons and follows training otherwise than ``"flip"`` does.

    Returns:
        For each layer the importances, shape (samples, neurons), in units of the loss.

    Raises:
        ValueError: an unknown estimator, a loss of the wrong shape, or no importance of a layer.

    Source: arXiv 2102.01344 fixes the variance over neurons; the estimators are this library's definitions.

    Example:
        >>> import torch
        >>> from bnnft.nn import BinaryActivation, BinaryLinear
        >>> model = torch.nn.Sequential(BinaryLinear(1, 2), BinaryActivation(), torch.nn.Linear(2, 1, bias=False))
        >>> _ = torch.nn.init.constant_(model[2].weight, 0.5)
        >>> loss = lambda: model(torch.ones(1, 1)).squeeze(1)
        >>> blocks = {"0": Block("0", activation="1")}
        >>> [neuron_importance(model, blocks, loss, way)["0"] for way in ("gradient", "flip", "ablation")]
        [tensor([[1., 1.]]), tensor([[1., 1.]]), tensor([[0.5000, 0.5000]])]
    """
    result = measured_importance(model, blocks, loss, estimator)
    if result.reasons:
        raise ValueError("; ".join(f"{layer}: {reason}" for layer, reason in result.reasons.items()))
    return result.values


def measured_importance(model: nn.Module, blocks: Mapping[str, Block], loss: Loss, estimator: Estimator) -> Importance:
    """Return the importances of the layers that have any, and why others have none; see :func:`neuron_importance`.

    Raises:
        ValueError: an unknown estimator, or a loss of the wrong shape.
    """
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator must be one of {', '.join(get_args(Estimator))}, got {estimator!r}")
    if not blocks:
        return Importance({}, {}, [])
    if estimator == "gradient":
        return _by_gradient(model, blocks, loss)
    factor = -1.0 if estimator == "flip" else 0.0
    changed = [_Changes(model, block, loss, factor).measure() for block in blocks.values()]
    values = {layer: value for each in changed for layer, value in each.values.items()}
    reasons = {layer: reason for each in changed for layer, reason in each.reasons.items()}
    return Importance(values, reasons, [name for each in changed for name in each.moved])


@torch.enable_grad()
def _by_gradient(model: nn.Module, blocks: Mapping[str, Block], loss: Loss) -> Importance:
    values, reasons = dict[str, Tensor](), dict[str, str]()
    with unchanged(model) as moved:  # until the gradient is there, which may need what the loss has changed
        with watch(model, list(blocks.values()), graph=True) as seen:
            value = loss()
        seen.check()
        rows = {len(output) for layer in blocks for output in seen[layer].outputs}
        if value.dim() > 1 or (value.dim() == 1 and rows and len(value) not in rows):
            samples = " or ".join(map(str, sorted(rows)))
            raise ValueError(f"loss must return one value or one a sample ({samples}), got shape {tuple(value.shape)}")
        outputs = {layer: seen[layer].outputs for layer in blocks if seen[layer].outputs}
        flat = [output for each in outputs.values() for output in each]
        if not value.requires_grad or not flat:
            gradients: list[Tensor | None] = [None] * len(flat)
        else:
            gradients = list(torch.autograd.grad(value.sum(), flat, allow_unused=True))
    for layer, each in outputs.items():
        own, gradients = gradients[: len(each)], gradients[len(each) :]
        axis = axis_of_outputs(model, blocks[layer], each[0])
        pairs = [(output.detach(), slope) for output, slope in zip(each, own, strict=True) if slope is not None]
        if not pairs:
            reasons[layer] = "the loss does not depend on its neuron outputs by any gradient"
        elif any(len(output) != len(each[0]) or not axis.fits(output) for output in each):
            reasons[layer] = "its runs differ in their number of samples"
        else:
            effects = [axis.spread(2 * a * slope) for a, slope in pairs]
            total = torch.stack([effect.flatten(2).sum(2) if effect.dim() > 2 else effect for effect in effects]).sum(0)
            values[layer] = total.abs() * (len(each[0]) if value.dim() == 0 else 1)
    return Importance(values, reasons, moved)


def axis_of_outputs(model: nn.Module, block: Block, output: Tensor) -> Axis:
    """Return the dimension of the neurons in a layer's outputs; of modules that were named by their sizes."""
    if block.route is not None and block.route.after is not None:
        return block.route.after
    weight = getattr(model.get_submodule(block.layer), "weight", None)
    neurons = output.shape[1] if weight is None else len(weight)
    if output.shape[1] != neurons and output.shape[-1] == neurons:
        return Axis(output.dim() - 1, neurons)
    return Axis(1, neurons if output.shape[1] % neurons == 0 else output.shape[1])


class _Changes:
    """Measures one layer by changing the output of one neuron after the other.

    Only what comes after the neurons is run again, where that is exact; else the whole loss.
    """

    def __init__(self, model: nn.Module, block: Block, loss: Loss, factor: float) -> None:
        self._model, self._block, self._loss, self._factor = model, block, loss, factor
        self._moved: list[str] = []

    @torch.no_grad()
    def measure(self) -> Importance:
        """Return the importance of the layer."""
        trace = Trace(self._model)
        with unchanged(self._model) as moved, watch(self._model, [self._block]) as seen, trace:
            clean = self._loss()
        seen.check()
        self._moved = moved
        outputs, layer = seen[self._block.layer].outputs, self._block.layer
        if not outputs:  # it did not run
            return Importance({}, {}, moved)
        if clean.shape != (len(outputs[0]),):
            reason = (
                f"the estimators flip and ablation need a loss that returns one value a sample ({len(outputs[0])}), "
                f"got shape {tuple(clean.shape)}: give loss=... that does"
            )
            return Importance({}, {layer: reason}, moved)
        axis = axis_of_outputs(self._model, self._block, outputs[0])
        losses = self._quick(trace, axis, [trace.number(output) for output in outputs], clean)
        if losses is None:
            losses = [self._again(axis, neuron) for neuron in range(axis.neurons)]
        return Importance({layer: (torch.stack(losses, dim=1) - clean[:, None]).abs()}, {}, self._moved)

    def _quick(self, trace: Trace, axis: Axis, starts: list[int], clean: Tensor) -> list[Tensor] | None:
        """Return the losses from the end of the forward alone, ``None`` where that is not what the whole loss gives."""
        try:
            replay = Replay(trace, starts, trace.number(clean))
            if not torch.equal(replay.run(lambda output: output), clean):
                return None
            changes = [partial(axis.scaled, neuron=neuron, factor=self._factor) for neuron in range(axis.neurons)]
            losses = [replay.run(change) for change in changes]
        except (ValueError, RuntimeError, TypeError, LookupError):  # what operations raise out of their place
            return None
        most = int(torch.stack([(loss - clean).abs().nan_to_num().sum() for loss in losses]).argmax())
        for neuron in {0, most}:
            if not torch.allclose(losses[neuron], self._again(axis, neuron), rtol=1e-4, atol=1e-5, equal_nan=True):
                return None
        return losses

    def _again(self, axis: Axis, neuron: int) -> Tensor:
        """Return the loss with one neuron changed."""
        change = {self._block.layer: partial(axis.scaled, neuron=neuron, factor=self._factor)}
        with unchanged(self._model) as moved, watch(self._model, [self._block], change=change) as seen:
            value = self._loss()
        seen.check()
        self._moved = moved
        return value
