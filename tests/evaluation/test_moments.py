"""Moments of sums and signs against Monte Carlo."""

import pytest
import torch
from monte_carlo import DRAWS, FALSE_ALARM, INPUTS, NEURONS, assert_moments, read
from scipy.stats import norm

from bnnft.compensation.correction import Correction
from bnnft.evaluation.moments import Errors, Moments, expected_sign, probability_of_class, sum_moments

RATES = [(0.0, 0.0), (0.1, 0.1), (0.0, 0.3), (0.4, 0.1), (0.5, 0.5)]


@pytest.mark.parametrize("rates", RATES[1:])
@pytest.mark.parametrize("certain", [True, False], ids=["certain inputs", "binary inputs"])
@pytest.mark.parametrize("operation", ["linear", "matmul"])
@pytest.mark.parametrize("corrected", [False, True])
def test_sums_of_bits_have_these_moments(rates, certain, operation, corrected):
    generator = torch.Generator().manual_seed(1)
    h = torch.rand(NEURONS, 1, generator=generator) + 0.5
    weight = torch.randn(NEURONS, INPUTS, generator=generator).sign() * h
    means = torch.rand(INPUTS, generator=generator) * 2 - 1
    left, shift = (0.7, 0.2) if corrected else (1.0, 0.0)
    weights = read(weight, rates, generator) - shift * h
    if certain:
        inputs, moments = means.expand(DRAWS, -1), Moments(means[None], torch.zeros(()))
    else:
        inputs = torch.where(torch.rand(DRAWS, INPUTS, generator=generator) < (1 + means) / 2, 1.0, -1.0)
        moments = Moments(means[None], second=torch.ones(()))
    errors = Errors(rates, Correction(weight.numel(), left, shift) if corrected else None)
    operand = weight if operation == "linear" else weight.t()
    samples = torch.einsum("dni,di->dn", weights, inputs) / left
    assert_moments(samples[:, None], sum_moments(operation, moments, operand, errors))


def test_the_mean_of_a_sign_is_that_of_gaussian_draws():
    generator = torch.Generator().manual_seed(2)
    mean, deviation = torch.tensor([-3.0, -0.5, 0.0, 1.0]), torch.tensor([2.0, 1.0, 3.0, 0.2])
    signs = torch.where(mean + deviation * torch.randn(DRAWS, 4, generator=generator) >= 0, 1.0, -1.0)
    expected = expected_sign(mean, deviation)
    off = (signs.mean(0) - expected).abs() / (1 - expected.square()).clamp(min=1e-7).sqrt() * DRAWS**0.5
    assert float(off.max()) < norm.isf(FALSE_ALARM / 8)


def test_the_highest_of_gaussian_scores_is_the_target_as_often_as_in_draws():
    generator = torch.Generator().manual_seed(0)
    mean, deviation = torch.randn(6, 5, generator=generator), torch.rand(6, 5, generator=generator) + 0.1
    targets, draws = torch.arange(6) % 5, 20_000
    samples = mean + deviation * torch.randn(draws, 6, 5, generator=generator)
    expected = probability_of_class(Moments(mean, deviation), targets)
    off = ((samples.argmax(2) == targets).float().mean(0) - expected).abs()
    assert float((off / (expected * (1 - expected) / draws).clamp(min=1e-9).sqrt()).max()) < norm.isf(1e-9 / 12)
