import pytest
import torch
import torch.nn.functional as F
from networks import small_data, small_net
from torch import nn
from torch.testing import assert_close
from torchmetrics import Metric

from bnnft.injection.sites import binarized_weights
from bnnft.metrics import ImportanceVariance, Margin, class_margin
from bnnft.metrics.meter import Meter
from bnnft.nn import BinaryActivation, BinaryConv2d, BinaryLinear, binarize
from bnnft.tracing.blocks import Block
from bnnft.tracing.neurons import thresholds


class Inline(nn.Module):
    """All norms and signs in one forward; two layers of one shape with norms of their own."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm0 = BinaryConv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.fc1, self.norm1 = BinaryLinear(16, 16, bias=False), nn.BatchNorm1d(16)
        self.fc2, self.norm2 = BinaryLinear(16, 16, bias=False), nn.BatchNorm1d(16)
        self.out = BinaryLinear(16, 3, bias=False)

    def parts(self, x):
        """Pre-activations by layer, then scores."""
        s = {"conv": self.conv(x)}
        a = binarize(self.norm0(s["conv"]))
        s["fc1"] = self.fc1(F.max_pool2d(a, 2).flatten(1))
        s["fc2"] = self.fc2(binarize(self.norm1(s["fc1"])))
        s["out"] = self.out(binarize(self.norm2(s["fc2"])))
        return s

    def forward(self, x):
        return self.parts(x)["out"]


def images(samples=24):
    return torch.randn(samples, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(samples) % 3


def measured(model, batches, **settings):
    """What a plain loop measures, without Lightning."""
    meter = Meter(model, **settings)
    for x, y in batches:
        with meter.watch(), torch.no_grad():
            model(x)
        meter.importance(lambda x=x, y=y: F.cross_entropy(model(x), y, reduction="none"))
    return meter, meter.results()


@pytest.mark.parametrize("size", [24, 7])
def test_numbers_are_those_of_a_slow_reference(size, randomized):
    """However the data are split into batches."""
    model, (x, y) = randomized(Inline()), images()
    meter, results = measured(model, zip(x.split(size), y.split(size), strict=True))
    assert meter.left_out == {}
    with torch.no_grad():
        parts = model.parts(x)
    for layer, norm in (("conv", model.norm0), ("fc1", model.norm1), ("fc2", model.norm2)):
        limits = thresholds(norm).view(-1, *[1] * (parts[layer].dim() - 2))
        margins = (parts[layer] - limits).abs()
        margins = margins[margins.isfinite()]  # one neuron of each layer is dead
        assert float(results[layer]["margin"]) == pytest.approx(float(margins.mean()), rel=1e-4)
        assert float(results[layer]["margin_below_2"]) == pytest.approx(float((margins < 2).float().mean()), rel=1e-5)
    assert float(results["out"]["class_margin"]) == pytest.approx(float(class_margin(parts["out"]).mean()), rel=1e-5)
    a = binarize(model.norm2(parts["fc2"])).detach().requires_grad_()
    losses = F.cross_entropy(model.out(a), y, reduction="none")
    importance = (2 * a * torch.autograd.grad(losses.sum(), a)[0]).abs().mean(0)
    assert_close(results["fc2"]["neuron_importance"], importance, rtol=1e-4, atol=1e-6)
    assert results.keys() == {"conv", "fc1", "fc2", "out"}


def test_scaled_weights_are_measured_in_units_of_their_scale(randomized):
    class Scaled(BinaryLinear):
        def forward(self, x):
            return F.linear(x, binarize(self.weight) * 0.25)

    data = [(small_data().tensors[0][:8], torch.arange(8) % 3)]
    results = []
    for kind in (BinaryLinear, Scaled):
        net = nn.Sequential(kind(12, 16, bias=False), BinaryActivation(), kind(16, 3, bias=False))
        results.append(measured(randomized(net), data)[1])
    for layer, name in (("0", "margin"), ("2", "class_margin")):
        assert_close(results[1][layer][name], results[0][layer][name])


def test_a_batch_that_is_cut_is_not_taken_in():
    model, x = small_net().eval(), small_data().tensors[0]
    meter = Meter(model, [Margin()])
    with meter.watch():
        model(x)
    cut = model[6].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), meter.watch():
        model(100 * x)
    cut.remove()
    _, results = measured(model, [(x, torch.zeros(48, dtype=torch.int64))], metrics=[Margin()])
    assert_close(meter.results()["0"]["margin"], results["0"]["margin"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_meter_around_another_one_sees_the_model_alone():
    model, (x, y) = small_net().eval(), small_data().tensors
    outer, inner = Meter(model, [Margin()]), Meter(model)
    for part in x.split(16):
        with outer.watch(), inner.watch():
            model(part)
    assert outer.left_out == inner.left_out == {}
    assert_close(outer.results()["3"]["margin"], inner.results()["3"]["margin"])
    assert y is not None


class Picky(Metric):
    """Somebody's metric that stumbles over a layer."""

    def __init__(self):
        super().__init__()
        self.add_state("seen", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, preactivations, fan_in):
        if fan_in == 12:
            raise ArithmeticError("not that one")
        self.seen += len(preactivations)

    def compute(self):
        return self.seen


def test_a_metric_that_fails_is_left_out_where_it_does():
    data = [(small_data().tensors[0], torch.arange(48) % 3)]
    meter, results = measured(small_net().eval(), data, metrics=[Picky(), Margin()])
    assert meter.left_out == {"Picky of 0": "not that one"}
    assert results["3"]["Picky"] == 48
    assert results["0"]["margin"] > 0


def test_several_weights_in_one_module_are_not_told_apart():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.randn(16, 16)) for _ in range(2))

        def forward(self, x):
            return F.linear(binarize(F.linear(x, binarize(self.first))), binarize(self.second))

    model = nn.Sequential(Packed(), BinaryActivation(), BinaryLinear(16, 3))
    meter, results = measured(model, [(torch.randn(8, 16), torch.arange(8) % 3)])
    assert meter.left_out == {"margins and importance of 0": "it computes with several binarized weights"}
    assert results.keys() == {"2"}


def test_layers_whose_forward_is_called_by_name_are_named():
    class Direct(nn.Sequential):
        def forward(self, x):
            return self[2](self[1](self[0].forward(x)))

    model = Direct(BinaryLinear(16, 16), BinaryActivation(), BinaryLinear(16, 3))
    meter, results = measured(model, [(torch.randn(8, 16), torch.arange(8) % 3)])
    assert meter.left_out == {"margins and importance of 0": "it does not run as a module"}
    assert results.keys() == {"2"}


def test_a_loss_without_gradients_through_the_signs_names_the_exact_estimator(randomized):
    model = nn.Sequential(BinaryLinear(12, 16), Sign(), BinaryLinear(16, 16), Sign(), BinaryLinear(16, 3))
    data = [(small_data().tensors[0], torch.arange(48) % 3)]
    meter, results = measured(randomized(model), data)
    assert meter.left_out == {
        "importance of 0": "no gradient passes the signs behind it; the estimator 'flip' is exact"
    }
    assert "importance" not in results["0"]
    assert results["2"]["importance"] > 0
    meter, results = measured(model, data, metrics=[ImportanceVariance("flip")])
    assert meter.left_out == {}
    assert results["0"]["importance"] > 0


class Sign(nn.Module):
    def forward(self, x):
        return torch.sign(x)


def test_weights_that_match_nothing_raise_at_once():
    with pytest.raises(ValueError, match="matches no parameter"):
        Meter(small_net(), weights=["fc9"])
    with pytest.raises(ValueError, match="different classes, got Margin 2 times"):
        Meter(small_net(), [Margin(), Margin()])


def test_only_chosen_weights_are_measured():
    model, data = small_net().eval(), [(small_data().tensors[0], torch.arange(48) % 3)]
    assert list(binarized_weights(model)) == ["0.weight", "3.weight", "6.weight"]
    assert measured(model, data, weights=["3"])[1].keys() == {"3"}


def test_named_modules_take_the_place_of_what_is_found():
    """The margin against the named norm, and the importance of the named activation."""
    model, (x, y) = small_net().eval(), small_data().tensors
    model[1].running_mean += 1
    meter, results = measured(model, [(x, y)], blocks=[Block("0", "1", "2"), Block("3", None, "5")])
    with torch.no_grad():
        assert float(results["0"]["margin"]) == pytest.approx(float((model[0](x) - 1).abs().mean()), rel=1e-4)
    assert results["3"]["importance"] > 0
    assert meter.remarks() == ["finds no batch norm between layer and neurons of 3: margins against zero"]


def test_the_training_mode_and_gradients_are_left_alone():
    model, (x, y) = small_net().eval(), small_data().tensors
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured(model, [(x, y)])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
