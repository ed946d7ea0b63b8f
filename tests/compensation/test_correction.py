import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnnft.compensation.correction import Correction, Corrections, Statistics, corrected


def test_statistics_of_batches_are_those_of_all_samples():
    values = torch.randn(30, 4, 3) * 5 + 100
    statistics = Statistics()
    for batch in values.split([7, 1, 22]):
        statistics.take(batch)
    flat = values.transpose(0, 1).flatten(1).double()
    assert torch.allclose(statistics.mean, flat.mean(1))
    assert torch.allclose(statistics.variance, flat.var(1))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
def test_what_is_subtracted_in_a_convolution_is_the_sum_of_what_its_kernel_sees(groups, padding):
    x, weight, bias = torch.randn(2, 4, 6, 5), torch.randn(6, 4 // groups, 3, 3).sign(), torch.randn(6)
    result = F.conv2d(x, weight, bias, padding=padding, groups=groups)
    got = corrected(
        Correction(weight.numel(), 0.5, 0.25), "conv2d", F.conv2d, (x, weight, bias),
        {"padding": padding, "groups": groups}, result,
    )  # fmt: skip
    expected = F.conv2d(x, 2 * (weight - 0.25), bias, padding=padding, groups=groups)
    assert torch.allclose(got, expected, atol=1e-4)


def test_magnitudes_of_the_weights_scale_the_shift():
    x, magnitude = torch.randn(5, 8), torch.rand(3, 1) + 0.5
    weight = torch.randn(3, 8).sign() * magnitude
    got = corrected(Correction(24, 0.5, 0.25, scaled=True), "linear", F.linear, (x, weight), {}, F.linear(x, weight))
    assert torch.allclose(got, F.linear(x, 2 * (weight - 0.25 * magnitude)), atol=1e-5)


def test_statistics_of_another_size_are_an_error_that_names_the_norm():
    model, statistics = nn.Sequential(nn.BatchNorm1d(4)).eval(), Statistics()
    statistics.take(torch.randn(8, 3))
    message = r"statistics of 0 have shape \(3,\), it has \(4,\)"
    with pytest.raises(ValueError, match=message), Corrections(model, {}, {"0": statistics}):
        model(torch.randn(2, 4))


def test_too_few_values_to_gather_are_an_error_that_names_the_norm():
    model = nn.Sequential(nn.BatchNorm1d(4)).eval()
    with pytest.raises(ValueError, match="0 needs two or more values"), Corrections(model, {}, {}, ["0"]):
        model(torch.randn(1, 4))
