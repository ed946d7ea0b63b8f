import math
from itertools import product

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bnnft.injection.sites import find_sites
from bnnft.metrics import Margin, margin
from bnnft.model import VGG3
from bnnft.nn import BinaryActivation, BinaryLinear
from bnnft.tracing.blocks import find_blocks
from bnnft.tracing.neurons import thresholds, watch
from bnnft.tracing.trace import Trace

SHAPES = [(7, 5), (4, 5, 3), (3, 5, 4, 2)]
DEAD = torch.tensor([0.3, -math.inf, -2.6, math.inf, 5.7])
ALIVE = torch.tensor([0.3, -1.4, -2.6, 0.1, 5.7])


def random(*shape, seed=0, scale=6.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slow_margins(preactivations, limits):
    """Return |s - T| for one value after the other, those of dead neurons left out, and how many these are."""
    margins, dead = [], 0
    for sample in preactivations.double():
        for neuron, values in enumerate(sample):
            threshold = float(limits[neuron]) if isinstance(limits, torch.Tensor) else limits
            for s in values.flatten().tolist():
                if math.isinf(threshold):
                    dead += 1
                else:
                    margins.append(abs(s - threshold))
    return margins, dead


def measured(preactivations, limits, fan_in, **kwargs):
    metric = Margin(**kwargs)
    metric.update(preactivations, limits, fan_in)
    return metric.compute()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("limits", [ALIVE, DEAD, 0.75], ids=["alive", "dead", "number"])
def test_margin_is_the_distance_to_the_threshold(shape, limits):
    margins = margin(random(*shape), limits)
    expected, dead = slow_margins(random(*shape), limits)
    assert margins.shape == shape
    assert_close(margins[margins.isfinite()].double(), torch.tensor(expected).double())
    assert margins.isinf().sum() == dead


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("limits", [ALIVE, DEAD, 0.75], ids=["alive", "dead", "number"])
def test_statistics_are_those_of_the_definition(shape, limits):
    margins, dead = slow_margins(random(*shape), limits)
    result = measured(random(*shape), limits, fan_in=20)
    mean = math.fsum(margins) / len(margins)
    expected = {
        "margin": mean,
        "margin_std": math.sqrt(math.fsum((m - mean) ** 2 for m in margins) / len(margins)),
        "margin_normalized": mean / math.sqrt(20),
        "margin_below_2": sum(m < 2 for m in margins) / len(margins),
        "margin_dead": dead / (dead + len(margins)),
    }
    assert {name: result[name].item() for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("limit", [16.0, 1.5])
def test_histogram_counts_normalized_margins_and_the_last_bin_the_rest(limit):
    margins, _ = slow_margins(random(40, 5), DEAD)
    counts, edges = measured(random(40, 5), DEAD, fan_in=20, bins=30, limit=limit)["margin_histogram"]
    expected = [0] * 30
    for m in margins:
        expected[min(29, int(m / math.sqrt(20) / limit * 30))] += 1
    assert counts.tolist() == expected
    assert edges.tolist() == pytest.approx([limit * math.sqrt(20) * b / 30 for b in range(31)], rel=1e-5)
    assert limit > 2 or expected[-1] > 1


@pytest.mark.parametrize("limits", [ALIVE, DEAD], ids=["alive", "dead"])
def test_quantiles_are_exact_to_one_bin(limits):
    margins = sorted(slow_margins(random(50, 5), limits)[0])
    result = measured(random(50, 5), limits, fan_in=20, quantiles=(0.05, 0.25, 0.5, 0.99))
    for level in (0.05, 0.25, 0.5, 0.99):
        exact = margins[math.ceil(level * len(margins)) - 1]
        assert abs(result[f"margin_q{round(100 * level):02d}"].item() - exact) <= 16 * math.sqrt(20) / 1024 + 1e-4


def test_layer_of_dead_neurons_has_no_margin():
    result = measured(random(4, 2), torch.tensor([math.inf, -math.inf]), fan_in=20)
    assert result["margin_dead"] == 1
    assert all(result[name].isnan() for name in ("margin", "margin_std", "margin_below_2", "margin_q50"))


def test_values_that_are_no_numbers_are_counted_apart_from_dead_neurons():
    values = random(6, 5)
    values[0, 0], values[1, 2], values[2, 1] = math.inf, math.nan, math.nan  # the last of a dead neuron
    finite = values.isfinite() & DEAD.isfinite()
    margins = (values.double() - DEAD.double()).abs()[finite].tolist()
    result = measured(values, DEAD, fan_in=20)
    assert result["margin"].item() == pytest.approx(math.fsum(margins) / len(margins), rel=1e-5)
    assert result["margin_dead"].item() == pytest.approx(12 / 30)
    assert result["margin_nonfinite"].item() == pytest.approx(2 / 30)
    assert result["margin_histogram"].counts.sum() == len(margins) == 16


def test_thresholds_that_are_no_numbers_are_not_dead_neurons():
    result = measured(random(6, 5), torch.tensor([math.nan, 0, 0, 0, math.inf]), fan_in=20)
    assert result["margin_nonfinite"].item() == pytest.approx(6 / 30)
    assert result["margin_dead"].item() == pytest.approx(6 / 30)


def test_each_quantile_has_a_name_of_its_own():
    result = measured(random(4, 5), ALIVE, fan_in=20, quantiles=(0.001, 0.004, 0.05, 0.29, 0.5, 0.999))
    names = [name.removeprefix("margin_q") for name in result if name.startswith("margin_q")]
    assert names == ["0p1", "0p4", "05", "29", "50", "99p9"]


@pytest.mark.parametrize("wrong", [{"quantiles": (0.5, 1.0)}, {"quantiles": (0.0,)}, {"bins": 0}, {"limit": 0.0}])
def test_arguments_out_of_range_raise(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Margin(**wrong)


# what the margin means, by trying all flips


def neuron(weights, threshold, gamma):
    """Return a layer that holds a neuron for each row of weights, all with the same threshold and gamma."""
    model = nn.Sequential(BinaryLinear(weights.shape[1], len(weights), bias=False), nn.BatchNorm1d(len(weights)))
    model.append(BinaryActivation()).eval().requires_grad_(False)
    model[0].weight.copy_(weights)
    nn.init.constant_(model[1].running_mean, threshold)
    nn.init.constant_(model[1].weight, gamma)
    return model


@pytest.mark.parametrize("gamma", [0.7, -0.7])
@pytest.mark.parametrize("threshold", [0.5, -2.3, 3.9])
def test_neuron_stands_under_all_flips_that_its_margin_allows_and_no_more(threshold, gamma):
    """All inputs, all sets of flips of a neuron with six weights: none of ceil(m / 2) - 1 flips turns it, one of
    ceil(m / 2) does."""
    weights = random(6)
    masks = torch.tensor(list(product([1.0, -1.0], repeat=6)))
    flips = (masks < 0).sum(1)
    inputs = masks
    model = neuron(masks * weights, threshold, gamma)
    turned = model(inputs) != model(inputs)[:, :1]  # inputs x masks; the first mask flips nothing
    margins = margin(model[0](inputs)[:, :1], threshold).squeeze(1)
    for m, outcome in zip(margins.tolist(), turned, strict=True):
        safe = math.ceil(m / 2) - 1
        assert not outcome[flips <= safe].any()
        assert outcome[flips == safe + 1].any()


@pytest.mark.parametrize("gamma", [0.7, -0.7])
def test_share_below_2_is_the_share_that_one_flip_turns(gamma):
    inputs, weights = random(30, 9, seed=1).sign(), random(8, 9, seed=2)
    limits = [-4.2, -2.9, -1.5, -0.5, 0.4, 1.7, 2.8, 4.4]
    turnable = 0
    for row, threshold in zip(weights, limits, strict=True):
        flipped = row.repeat(10, 1)
        for weight in range(9):
            flipped[1 + weight, weight] *= -1
        outputs = neuron(flipped, threshold, gamma)(inputs)
        turnable += int((outputs != outputs[:, :1]).any(1).sum())
    result = measured(inputs @ weights.sign().T, torch.tensor(limits), fan_in=9)
    assert result["margin_below_2"].item() == pytest.approx(turnable / (30 * 8))
    assert 0 < turnable < 30 * 8


# end to end, through a network with pooling before batch norm


def slow_pooled_convolution(x, weight):
    """Return the 2x2 maxima of a 3x3 convolution with the weights' signs, zeros around, by its definition."""
    samples, _, height, width = x.shape
    x, signs = x.double(), torch.where(weight >= 0, 1.0, -1.0).double()
    s = torch.zeros(samples, len(signs), height, width, dtype=torch.float64)
    for dy, dx in product(range(3), range(3)):
        for i, j in product(range(height), range(width)):
            y, z = i + dy - 1, j + dx - 1
            if 0 <= y < height and 0 <= z < width:
                s[:, :, i, j] += x[:, :, y, z] @ signs[:, :, dy, dx].T
    pooled = s.reshape(samples, len(signs), height // 2, 2, width // 2, 2)
    return torch.stack([pooled[:, :, :, a, :, b] for a, b in product(range(2), range(2))]).amax(0)


def test_margins_of_a_network_with_pooling_before_batch_norm(randomized):
    """Real-valued inputs in the first layer, binary ones in the second, a fully connected one; one dead neuron each."""
    model = randomized(VGG3((2, 8, 8), 3, channels=4, width=6))
    inputs = random(5, 2, 8, 8, scale=1.0)
    with torch.no_grad(), Trace(model) as trace:
        model(inputs)
    found = find_blocks(trace, [site.layer for site in find_sites(model)])
    with torch.no_grad(), watch(model, [block for block, _ in found.values() if not block.last]) as seen:
        model(inputs)
    first, second = seen["conv1"].outputs[0], seen["conv2"].outputs[0]
    signs = torch.where(model.fc1.weight >= 0, 1.0, -1.0)
    slow = {
        "conv1": slow_pooled_convolution(inputs, model.conv1.weight),
        "conv2": slow_pooled_convolution(first, model.conv2.weight),
        "fc1": second.flatten(1) @ signs.T,
    }
    for layer, norm, fan_in in (("conv1", model.norm1, 18), ("conv2", model.norm2, 36), ("fc1", model.norm3, 16)):
        limits = []
        for mean, var, gamma, beta in zip(norm.running_mean, norm.running_var, norm.weight, norm.bias, strict=True):
            alive = gamma != 0
            limits.append((mean - beta * math.sqrt(var + norm.eps) / gamma).item() if alive else math.inf)
        margins, dead = slow_margins(slow[layer], torch.tensor(limits))
        result = measured(seen[layer].preactivations[0], thresholds(norm), fan_in)
        assert result["margin"].item() == pytest.approx(math.fsum(margins) / len(margins), rel=1e-5)
        assert result["margin_dead"].item() == pytest.approx(1 / len(limits)) == dead / (dead + len(margins))
        assert result["margin_below_2"].item() == pytest.approx(sum(m < 2 for m in margins) / len(margins))


def test_defaults_are_the_documented_ones():
    result = measured(random(20, 5), ALIVE, fan_in=20)
    assert [name for name in result if name.startswith("margin_q")] == ["margin_q05", "margin_q50", "margin_q95"]
    counts, edges = result["margin_histogram"]
    assert len(counts) == 1024
    assert edges[-1].item() == pytest.approx(16 * math.sqrt(20))
