"""Moments held against draws.

Means are held against normal tests and variances against chi-squared ones: each fails by chance with a probability of
1e-9, for a fixed seed.
"""

import torch
from scipy.stats import chi2, norm

FALSE_ALARM, DRAWS, INPUTS, NEURONS = 1e-9, 4000, 60, 4


def assert_moments(samples, moments):
    """Samples of shape (draws, ...) have this mean and this deviation."""
    mean = moments.mean.detach().double()
    deviation = moments.spread.detach().expand_as(mean).double().clamp(min=1e-9)
    cells = mean.numel()
    limit = float(norm.isf(FALSE_ALARM / 2 / cells))
    assert float(((samples.double().mean(0) - mean).abs() / deviation).max()) * len(samples) ** 0.5 < limit
    ratio = samples.double().var(0) / deviation.square()
    # sums of bits have lighter tails than a Gaussian: their variance varies less than that
    low, high = (
        chi2.ppf(q, len(samples) - 1) / (len(samples) - 1) for q in (FALSE_ALARM / cells, 1 - FALSE_ALARM / cells)
    )
    assert float(ratio.min()) > low
    assert float(ratio.max()) < high


def read(weight, rates, generator):
    """Weights as they read in one draw each."""
    flipped = torch.rand(DRAWS, *weight.shape, generator=generator) < torch.where(weight > 0, rates[1], rates[0])
    return torch.where(flipped, -weight, weight)
