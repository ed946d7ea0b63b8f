"""The importance of neurons for the loss, and how unequal it is."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from bnnft.plots import Plot, plot_sorted
from bnnft.tracing.blocks import Block
from bnnft.tracing.neurons import changed_outputs, watch

Estimator = Literal["gradient", "flip", "ablation"]


def importance_variance(importance: Tensor) -> dict[str, Tensor]:
    """Return variance, coefficient of variation and mean over the importances of neurons.

    Args:
        importance: one value a neuron, shape (neurons,), >= 0.

    Returns:
        ``importance_variance`` (population variance), ``importance_cv`` (standard deviation over mean, free of
        the loss's scale) and ``importance`` (mean).

    Source: arXiv 2102.01344 (inter-neuron-level metric); the coefficient of variation is added by this library.

    Example:
        >>> import torch
        >>> importance_variance(torch.tensor([1.0, 3.0]))
        {'importance_variance': tensor(1.), 'importance_cv': tensor(0.5000), 'importance': tensor(2.)}
    """
    variance, mean = importance.var(correction=0), importance.mean()
    return {"importance_variance": variance, "importance_cv": variance.sqrt() / mean, "importance": mean}


def neuron_importance(
    model: nn.Module,
    chains: Mapping[str, Block],
    loss: Callable[[], Tensor],
    estimator: Estimator = "gradient",
) -> dict[str, Tensor]:
    """Return how much the loss of each sample depends on each neuron's output bit.

    Args:
        model: in eval mode, without flips.
        chains: layer to chain, with neuron outputs (see :mod:`bnnft.tracing.blocks`).
        loss: runs the model on a batch and returns its loss: one value a sample, or, for ``"gradient"`` only, the
            mean over the batch.
        estimator: ``"gradient"``, ``|sum over positions of 2 a dL/da|``, the first-order effect of turning the bit:
            one backward for all neurons; ``"flip"``, ``|L(-a) - L(a)|``, exact, one forward a neuron;
            ``"ablation"``, ``|L(0) - L(a)|``, likewise.

    Returns:
        For each layer the importances, shape (samples, neurons), in units of the loss.

    Raises:
        ValueError: an unknown estimator, or a loss of the wrong shape.

    Source: arXiv 2102.01344 fixes the variance over neurons; the estimators are this library's definitions.

    Example:
        >>> import torch
        >>> from bnnft.nn import BinaryActivation, BinaryLinear
        >>> model = torch.nn.Sequential(BinaryLinear(1, 2), BinaryActivation(), torch.nn.Linear(2, 1, bias=False))
        >>> _ = torch.nn.init.constant_(model[2].weight, 0.5)
        >>> loss = lambda: model(torch.ones(1, 1)).squeeze(1)
        >>> chains = {"0": Block("0", activation="1")}
        >>> [neuron_importance(model, chains, loss, way)["0"] for way in ("gradient", "flip", "ablation")]
        [tensor([[1., 1.]]), tensor([[1., 1.]]), tensor([[0.5000, 0.5000]])]
    """
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator must be one of {', '.join(get_args(Estimator))}, got {estimator!r}")
    if estimator == "gradient":
        return _by_gradient(model, chains, loss)
    factor = -1.0 if estimator == "flip" else 0.0
    return {layer: _by_change(model, chain, loss, factor) for layer, chain in chains.items()}


@torch.enable_grad()
def _by_gradient(model: nn.Module, chains: Mapping[str, Block], loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    with watch(model, list(chains.values()), graph=True) as seen:
        value = loss()
    outputs = [output for layer in chains for output in seen[layer].outputs]
    samples = len(outputs[0])
    if value.dim() == 0:
        value = value * samples
    elif value.shape != (samples,):
        raise ValueError(f"loss must return one value or one a sample ({samples}), got shape {tuple(value.shape)}")
    lost = [layer for layer in chains if not all(output.requires_grad for output in seen[layer].outputs)]
    if lost:
        raise ValueError(f"the loss does not depend on the neuron outputs of {', '.join(lost)} by any gradient")
    gradients = iter(torch.autograd.grad(value.sum(), outputs, materialize_grads=True))
    importance = {}
    for layer in chains:
        effects = [2 * output.detach() * next(gradients) for output in seen[layer].outputs]
        views = [_by_neuron(effect, model, chains[layer]) for effect in effects]
        of_neurons = [view.reshape(*view.shape[:2], -1).sum(2) for view in views]
        importance[layer] = torch.stack(of_neurons).sum(0).abs()
    return importance


@torch.no_grad()
def _by_change(model: nn.Module, chain: Block, loss: Callable[[], Tensor], factor: float) -> Tensor:
    with watch(model, [chain]) as seen:
        clean = loss()
    samples, neurons = _by_neuron(seen[chain.layer].outputs[0], model, chain).shape[:2]
    if clean.shape != (samples,):
        raise ValueError(
            f"the estimators flip and ablation need a loss that returns one value a sample ({samples}), "
            f"got shape {tuple(clean.shape)}: give loss=... that does"
        )
    changes = []
    for neuron in range(neurons):

        def change(output: Tensor, neuron: int = neuron) -> Tensor:
            output = output.clone()
            _by_neuron(output, model, chain)[:, neuron] *= factor
            return output

        with changed_outputs(model, chain, change):
            changes.append((loss() - clean).abs())
    return torch.stack(changes, dim=1)


def _by_neuron(output: Tensor, model: nn.Module, chain: Block) -> Tensor:
    """Return a view of shape (N, neurons, ...), also where features come last or were flattened with positions."""
    weight = getattr(model.get_submodule(chain.layer), "weight", None)
    neurons = output.shape[1] if weight is None else len(weight)
    if output.shape[1] != neurons and output.shape[-1] == neurons:
        return output.movedim(-1, 1)
    if output.shape[1] != neurons and output.shape[1] % neurons == 0:
        return output.view(len(output), neurons, -1)
    return output


class ImportanceVariance(Metric):
    """Variance and coefficient of variation over the importances of a layer's neurons.

    The importance of a neuron is its mean over all samples. Values of samples: processes merge exactly.

    Args:
        estimator: how the callback is to estimate importance, see :func:`neuron_importance`.
        kwargs: of :class:`torchmetrics.Metric`.

    ``update`` takes ``importance`` of shape (N, neurons); ``compute`` returns the dict of
    :func:`importance_variance` and ``neuron_importance``, one value a neuron.

    Source: arXiv 2102.01344 (inter-neuron-level metric).

    Example:
        >>> import torch
        >>> metric = ImportanceVariance()
        >>> metric.update(torch.tensor([[0.0, 2.0], [2.0, 4.0]]))  # neuron means: 1 and 3
        >>> metric.compute()["importance_cv"]
        tensor(0.5000)
    """

    full_state_update = False
    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self, estimator: Estimator = "gradient", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if estimator not in get_args(Estimator):
            raise ValueError(f"estimator must be one of {', '.join(get_args(Estimator))}, got {estimator!r}")
        self.estimator = estimator
        self.add_state("total", torch.zeros(1), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, importance: Tensor) -> None:
        """Take in the importances of one batch of one layer."""
        if importance.dim() != 2:
            raise ValueError(f"importance must have shape (N, neurons), got {tuple(importance.shape)}")
        self.total = self.total + importance.detach().float().sum(0)
        self.count += len(importance)

    def compute(self) -> dict[str, Tensor]:
        """Return the statistics over the layer's neurons, and the importance of each."""
        importance = self.total / self.count
        return {**importance_variance(importance), "neuron_importance": importance}

    def plot(self, val: dict[str, Tensor] | None = None, ax: Any = None) -> Plot:
        """Draw the neurons' importances in descending order; returns (figure, axes)."""
        result = self.compute() if val is None else val
        values, cv = result["neuron_importance"], float(result["importance_cv"])
        title = f"coefficient of variation {cv:.3f}"
        return plot_sorted(values.tolist(), "neuron, most important first", "importance", title, ax)
