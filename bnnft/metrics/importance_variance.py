"""How unequal the importance of neurons is."""

from typing import Any, get_args

import torch
from torch import Tensor

from bnnft.metrics.importance import Estimator
from bnnft.metrics.moments import MomentsMetric
from bnnft.plots import Plot, plot_sorted


def importance_variance(importance: Tensor, squared_errors: Tensor | None = None) -> dict[str, Tensor]:
    """Return variance, coefficient of variation (CV) and mean over the importances of neurons.

    Args:
        importance: one value a neuron, shape (neurons,), >= 0, in units of the loss.
        squared_errors: squared standard error of each importance, as far as it differs from that of their mean. Errors
            make neurons that are equal look unequal: their mean is subtracted from the variance before the root.

    Returns:
        ``importance_variance`` (population variance as measured), ``importance_cv`` (standard deviation over mean,
        free of the loss's scale) and ``importance`` (mean); with errors also ``importance_cv_error``, the standard
        error of the CV.

    Source: arXiv 2102.01344 (inter-neuron-level metric); the CV, its correction and its error are added by this
    library. The error is that of a variance of values with independent normal errors, ``sqrt(sum(4 d^2 e^2 + 2 e^4)) /
    neurons`` for deviations d and errors e.

    Example:
        >>> import torch
        >>> importance_variance(torch.tensor([1.0, 3.0]))
        {'importance_variance': tensor(1.), 'importance_cv': tensor(0.5000), 'importance': tensor(2.)}
        >>> importance_variance(torch.tensor([1.0, 3.0]), torch.tensor([0.5, 1.0]))["importance_cv"]
        tensor(0.2500)
    """
    variance, mean = importance.var(correction=0), importance.mean()
    result = {"importance_variance": variance, "importance_cv": variance.sqrt() / mean, "importance": mean}
    if squared_errors is None:
        return result
    corrected = (variance - squared_errors.mean()).clamp(min=0)
    deviations = ((importance - mean).square() - squared_errors).clamp(min=0)
    error = (4 * deviations * squared_errors + 2 * squared_errors.square()).sum().sqrt() / len(importance)
    cv = corrected.sqrt() / mean
    return result | {"importance_cv": cv, "importance_cv_error": (corrected + error).sqrt() / mean - cv}


class ImportanceVariance(MomentsMetric):
    """Variance and coefficient of variation (CV) over the importances of a layer's neurons.

    The importance of a neuron is its mean over all samples. The CV is freed of what too few samples add to it. Values
    of samples: processes merge exactly.

    Args:
        estimator: how importance is to be estimated, see :func:`bnnft.metrics.neuron_importance`.
        kwargs: of :class:`torchmetrics.Metric`.

    ``update`` takes ``importance`` of shape (N, neurons); ``compute`` returns the dict of :func:`importance_variance`,
    ``importance_nonfinite`` (share of samples with an importance that is infinite or no number, left out of the
    others) and ``neuron_importance``, one value a neuron. Of a single sample the CV is as measured, and its error
    infinite.

    Source: arXiv 2102.01344 (inter-neuron-level metric).

    Example:
        >>> import torch
        >>> metric = ImportanceVariance()
        >>> metric.update(torch.tensor([[0.0, 2.0], [2.0, 4.0]]))  # neuron means: 1 and 3
        >>> metric.compute()["importance_cv"]
        tensor(0.5000)
    """

    higher_is_better = False
    nonfinite: Tensor

    def __init__(self, estimator: Estimator = "gradient", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if estimator not in get_args(Estimator):
            raise ValueError(f"estimator must be one of {', '.join(get_args(Estimator))}, got {estimator!r}")
        self.estimator = estimator
        self.add_state("nonfinite", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, importance: Tensor) -> None:
        """Take in the importances of one batch of one layer."""
        if importance.dim() != 2:
            raise ValueError(f"importance must have shape (N, neurons), got {tuple(importance.shape)}")
        importance = importance.detach().float()
        finite = importance.isfinite().all(1)
        self.nonfinite += len(importance) - finite.sum()
        importance = importance[finite]
        # what a sample adds to all neurons alike makes none of them differ: it is a stream of its own
        level = importance.mean(1, keepdim=True)
        self._add(torch.cat([importance - level, level], dim=1))

    def compute(self) -> dict[str, Tensor]:
        """Return the statistics over the layer's neurons, and the importance of each."""
        count, mean, m2 = self._moments()
        if not bool(count):
            mean, m2 = mean.new_full((2,), torch.nan), mean.new_full((2,), torch.nan)
        importance = mean[:-1] + mean[-1]
        result = importance_variance(importance, m2[:-1] / ((count - 1).clamp(min=1) * count))
        if count == 1:
            unlimited = torch.full_like(importance[0], torch.inf)
            result = importance_variance(importance) | {"importance_cv_error": unlimited}
        nonfinite = self.nonfinite / (self.nonfinite + count)
        return {**result, "importance_nonfinite": nonfinite, "neuron_importance": importance}

    def plot(self, val: dict[str, Tensor] | None = None, ax: Any = None) -> Plot:
        """Draw the neurons' importances in descending order; returns (figure, axes)."""
        result = self.compute() if val is None else val
        values, cv = result["neuron_importance"], float(result["importance_cv"])
        title = f"coefficient of variation {cv:.3f}"
        return plot_sorted(values.tolist(), "neuron, most important first", "importance", title, ax)
