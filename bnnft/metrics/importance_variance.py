"""The importance of neurons for the loss, and how unequal it is."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from bnnft.plots import Plot, plot_sorted
from bnnft.probes import Chain, watch

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
    chains: Mapping[str, Chain],
    loss: Callable[[], Tensor],
    estimator: Estimator = "gradient",
) -> dict[str, Tensor]:
    """Return how much the loss of each sample depends on each neuron's output bit.

    Args:
        model: in eval mode, without flips.
        chains: layer to chain, with neuron outputs (see :mod:`bnnft.probes`).
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
        >>> from bnnft.nn import BinaryActivation
        >>> model = torch.nn.Sequential(BinaryActivation(), torch.nn.Linear(2, 1, bias=False))
        >>> _ = torch.nn.init.constant_(model[1].weight, 0.5)
        >>> loss = lambda: model(torch.tensor([[1.0, -1.0]])).squeeze(1)
        >>> chains = {"layer": Chain("layer", activation="0")}
        >>> [neuron_importance(model, chains, loss, way)["layer"] for way in ("gradient", "flip", "ablation")]
        [tensor([[1., 1.]]), tensor([[1., 1.]]), tensor([[0.5000, 0.5000]])]
    """
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator must be one of {', '.join(get_args(Estimator))}, got {estimator!r}")
    if estimator == "gradient":
        return _by_gradient(model, chains, loss)
    factor = -1.0 if estimator == "flip" else 0.0
    return {layer: _by_change(model, chain, loss, factor) for layer, chain in chains.items()}


@torch.enable_grad()
def _by_gradient(model: nn.Module, chains: Mapping[str, Chain], loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    with watch(model, list(chains.values()), graph=True) as seen:
        value = loss()
    outputs = [seen[layer].outputs[0] for layer in chains]
    samples = len(outputs[0])
    if value.dim() == 0:
        value = value * samples
    elif value.shape != (samples,):
        raise ValueError(f"loss must return one value or one a sample ({samples}), got shape {tuple(value.shape)}")
    gradients = torch.autograd.grad(value.sum(), outputs, materialize_grads=True)
    effects = [2 * output.detach() * gradient for output, gradient in zip(outputs, gradients, strict=True)]
    return {
        layer: effect.flatten(2).sum(2).abs() if effect.dim() > 2 else effect.abs()
        for layer, effect in zip(chains, effects, strict=True)
    }


@torch.no_grad()
def _by_change(model: nn.Module, chain: Chain, loss: Callable[[], Tensor], factor: float) -> Tensor:
    with watch(model, [chain]) as seen:
        clean = loss()
    samples, neurons = seen[chain.layer].outputs[0].shape[:2]
    if clean.shape != (samples,):
        raise ValueError(
            f"the estimators flip and ablation need a loss that returns one value a sample ({samples}), "
            f"got shape {tuple(clean.shape)}: give loss=... that does"
        )
    assert chain.activation is not None
    activation, calls = model.get_submodule(chain.activation), [0]
    changes = []
    for neuron in range(neurons):

        def change(module: nn.Module, args: Any, output: Tensor, neuron: int = neuron) -> Tensor | None:
            calls[0] += 1
            if (calls[0] - 1) % chain.calls != chain.call:
                return None
            output = output.clone()
            output[:, neuron] *= factor
            return output

        calls[0] = 0
        with ExitStack() as stack:
            stack.callback(activation.register_forward_hook(change).remove)
            changes.append((loss() - clean).abs())
    return torch.stack(changes, dim=1)


class ImportanceVariance(Metric):
    """Variance and coefficient of variation over the importances of a layer's neurons.

    The importance of a neuron is its mean over all samples. Values of samples: processes merge exactly.

    Args:
        estimator: how the callback is to estimate importance, see :func:`neuron_importance`.
        kwargs: of :class:`torchmetrics.Metric`.

    ``update`` takes ``importance`` of shape (N, neurons); ``compute`` returns the dict of
    :func:`importance_variance`.

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

    def importance(self) -> Tensor:
        """Return the mean importance of each neuron."""
        return self.total / self.count

    def compute(self) -> dict[str, Tensor]:
        """Return the statistics over the layer's neurons."""
        return importance_variance(self.importance())

    def plot(self, val: Any = None, ax: Any = None) -> Plot:
        """Draw the neurons' importances (or ``val``, one a neuron) in descending order; returns (figure, axes)."""
        values = self.importance() if val is None else val
        cv = float(importance_variance(values)["importance_cv"])
        title = f"coefficient of variation {cv:.3f}"
        return plot_sorted(values.tolist(), "neuron, most important first", "importance", title, ax)
