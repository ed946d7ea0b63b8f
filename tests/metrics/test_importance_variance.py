import math

import pytest
import torch
from torch.testing import assert_close

from bnnft.metrics import ImportanceVariance, importance_variance


def slow_variance(importance):
    """Return population variance, standard deviation over mean, and mean."""
    mean = math.fsum(importance) / len(importance)
    variance = math.fsum((value - mean) ** 2 for value in importance) / len(importance)
    return {"importance_variance": variance, "importance_cv": math.sqrt(variance) / mean, "importance": mean}


def as_floats(result):
    return {name: value.item() for name, value in result.items()}


def test_variance_over_neurons_is_that_of_the_definition():
    values = torch.rand(17, generator=torch.Generator().manual_seed(0))
    assert as_floats(importance_variance(values)) == pytest.approx(slow_variance(values.tolist()), rel=1e-5)


def test_scale_of_the_loss_changes_the_variance_but_not_its_coefficient():
    values = torch.rand(17, generator=torch.Generator().manual_seed(0))
    one, ten = importance_variance(values), importance_variance(10 * values)
    assert_close(ten["importance_cv"], one["importance_cv"])
    assert_close(ten["importance_variance"], 100 * one["importance_variance"])


def test_importance_of_a_neuron_is_its_mean_over_all_samples():
    values = torch.rand(9, 4, generator=torch.Generator().manual_seed(0))
    metric = ImportanceVariance()
    for part in values.split([2, 6, 1]):
        metric.update(part)
    means = [math.fsum(neuron) / 9 for neuron in values.T.tolist()]
    result = metric.compute()
    assert result.pop("neuron_importance").tolist() == pytest.approx(means)
    expected = slow_variance(means)
    assert {name: result[name].item() for name in ("importance", "importance_variance")} == pytest.approx(
        {name: expected[name] for name in ("importance", "importance_variance")}, rel=1e-5
    )
    deviations = [[value - math.fsum(row) / 4 for value in row] for row in values.double().tolist()]
    squared = [sum((row[n] - math.fsum(r[n] for r in deviations) / 9) ** 2 for row in deviations) for n in range(4)]
    corrected = expected["importance_variance"] - math.fsum(squared) / 4 / 8 / 9
    assert result["importance_cv"].item() == pytest.approx(math.sqrt(corrected) / expected["importance"], rel=1e-4)


def of_equal_neurons(samples, seed, neurons=64):
    """Importances whose true means are all 1, and so their true CV 0: independent ones, as |N(0, 1)| is."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, neurons, generator=generator).abs() * math.sqrt(math.pi / 2)


def of_unequal_neurons(samples, seed, neurons=64):
    """A true CV of 0.2, each sample weighing on all neurons alike, as its loss does, and on each by itself."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.linspace(1 - 0.2 * math.sqrt(3), 1 + 0.2 * math.sqrt(3), neurons)
    shared = torch.rand(samples, 1, generator=generator) * 2
    return means * shared * torch.randn(samples, neurons, generator=generator).abs() * math.sqrt(math.pi / 2)


def measured(importance):
    metric = ImportanceVariance()
    metric.update(importance)
    return {name: metric.compute()[name].item() for name in ("importance_cv", "importance_cv_error")}


@pytest.mark.parametrize("samples", [20, 100, 1000])
def test_equal_neurons_have_a_cv_of_0_however_few_samples(samples):
    """Uncorrected it reads .17, .08 and .02; the squares of 40 runs have a mean of 0 within their own errors."""
    runs = [measured(of_equal_neurons(samples, seed)) for seed in range(40)]
    raw = importance_variance(of_equal_neurons(samples, 0).mean(0))["importance_cv"].item()
    assert raw > 2 * sum(run["importance_cv"] for run in runs) / 40
    # near 0 it is the square of the CV that has normal errors, and the error of the CV is where it ends
    squares = [(run["importance_cv"] ** 2, (run["importance_cv"] + run["importance_cv_error"]) ** 2) for run in runs]
    inside = sum(square <= 2 * (end - square) for square, end in squares)
    assert inside >= 35  # two standard errors leave out 1 of 40: fewer by chance in less than 1 of 1,000 sets of seeds


@pytest.mark.parametrize("samples", [50, 400])
def test_few_samples_add_nothing_to_the_cv_of_a_layer(samples):
    """The mean of 40 runs is the true CV within 5 %, and two standard errors hold it, also where samples are shared."""
    runs = [measured(of_unequal_neurons(samples, seed)) for seed in range(40)]
    means = torch.linspace(1 - 0.2 * math.sqrt(3), 1 + 0.2 * math.sqrt(3), 64)
    true = (means.std(correction=0) / means.mean()).item()
    assert sum(run["importance_cv"] for run in runs) / 40 == pytest.approx(true, rel=0.05)
    inside = sum(abs(run["importance_cv"] - true) <= 2 * run["importance_cv_error"] for run in runs)
    assert inside >= 34  # they leave out 1 of 20: fewer by chance in less than 1 of 200 sets of seeds


def test_one_sample_has_no_known_error():
    result = measured(torch.tensor([[1.0, 3.0]]))
    assert result == {"importance_cv": 0.5, "importance_cv_error": math.inf}


def test_importance_that_is_no_number_is_counted_apart():
    values = torch.rand(9, 4, generator=torch.Generator().manual_seed(0))
    broken = values.clone()
    broken[2, 1], broken[5, 0] = math.nan, math.inf
    some, metric = ImportanceVariance(), ImportanceVariance()
    metric.update(broken)
    some.update(values[[0, 1, 3, 4, 6, 7, 8]])
    result, expected = metric.compute(), some.compute()
    assert result.pop("importance_nonfinite").item() == pytest.approx(2 / 9)
    assert all(torch.equal(value, expected[name]) for name, value in result.items())


def test_no_number_at_all_gives_none():
    metric = ImportanceVariance()
    metric.update(torch.full((3, 4), math.nan))
    result = metric.compute()
    assert result["importance_nonfinite"] == 1
    assert all(result[name].isnan().all() for name in result if name != "importance_nonfinite")


@pytest.mark.parametrize("shape", [(4,), (4, 3, 2)])
def test_importance_of_a_wrong_shape_raises(shape):
    with pytest.raises(ValueError, match="importance must have shape"):
        ImportanceVariance().update(torch.zeros(shape))


def test_the_error_of_a_cv_is_that_of_a_variance_of_values_with_errors():
    """sqrt(sum(4 d^2 e^2 + 2 e^4)) / n, of deviations that are freed of the errors too."""
    values, errors = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.1, 0.2, 0.3])
    result = importance_variance(values, errors)
    free = [max((value - 3) ** 2 - error, 0) for value, error in zip((1, 2, 6), (0.1, 0.2, 0.3), strict=True)]
    error = sum(4 * d * e + 2 * e**2 for d, e in zip(free, (0.1, 0.2, 0.3), strict=True)) ** 0.5 / 3
    corrected = 14 / 3 - 0.2
    assert float(result["importance_cv"]) == pytest.approx(corrected**0.5 / 3)
    assert float(result["importance_cv_error"]) == pytest.approx((corrected + error) ** 0.5 / 3 - corrected**0.5 / 3)
