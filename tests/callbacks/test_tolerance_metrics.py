import pytest
import torch
from networks import Project, equal_states, loader, small_data, small_net, state, trainer
from torch import nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from bnnft.callbacks import BitFlipTraining, ToleranceMetrics
from bnnft.metrics import ImportanceVariance, class_margin
from bnnft.nn import BinaryActivation, BinaryLinear
from bnnft.tracing.neurons import thresholds


def validate(tmp_path, module, callback=None):
    run = trainer(tmp_path, [ToleranceMetrics() if callback is None else callback])
    run.validate(module, loader(), verbose=False)
    return {name: float(value) for name, value in run.callback_metrics.items()}


def trained(tmp_path, net=None):
    """A project whose batch norms have statistics to speak of."""
    module = Project(net)
    trainer(tmp_path, [BitFlipTraining(0.1)]).fit(module, loader())
    return module


def test_logged_values_are_those_of_the_definition(tmp_path):
    """Margins, importance and class margin equal a direct computation on the whole data at once."""
    module = trained(tmp_path)
    logged = validate(tmp_path, module)
    net, (x, y) = module.net.eval(), small_data().tensors
    s = net[0](x)
    assert logged["val/margin/0"] == pytest.approx(float((s - thresholds(net[1])).abs().mean().detach()), rel=1e-5)
    a = net[:3](x).detach().requires_grad_()
    losses = nn.functional.cross_entropy(net[3:](a), y, reduction="none")
    importance = (2 * a * torch.autograd.grad(losses.sum(), a)[0]).abs().mean(0)
    assert logged["val/importance_variance/0"] == pytest.approx(float(importance.var(correction=0).detach()), rel=1e-4)
    assert logged["val/class_margin/6"] == pytest.approx(float(class_margin(net(x)).mean().detach()), rel=1e-5)
    assert {name.split("/")[-1] for name in logged if "margin/" in name} == {"0", "3", "6"}


class Counting(Project):
    """Has everything that measuring could disturb: dropout, random augmentation, a metric of its own, logs."""

    def __init__(self):
        net = small_net()
        net.insert(3, nn.Dropout(0.2))
        super().__init__(net)
        self.accuracy = MulticlassAccuracy(3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x + 0.1 * torch.randn_like(x)
        self.accuracy(self(x), y)
        self.log("train/acc", self.accuracy, on_step=False, on_epoch=True)
        return {"loss": super().training_step((x, y), batch_idx)}


def test_measuring_changes_nothing_of_training(tmp_path):
    """With validation in the middle of epochs, weights, statistics and the training's own metrics are bit-equal."""

    def fit(callbacks):
        torch.manual_seed(0)
        module = Counting()
        run = trainer(tmp_path, callbacks, val_check_interval=2)
        run.fit(module, loader(shuffle=True), loader())
        return state(module), run.callback_metrics["train/acc"]

    (measured, accuracy), (plain, other) = fit([ToleranceMetrics()]), fit([])
    assert equal_states(measured, plain)
    assert torch.equal(accuracy, other)


def test_sanity_checking_is_not_measured(tmp_path):
    callback = ToleranceMetrics()
    trainer(tmp_path, [callback], num_sanity_val_steps=2, limit_val_batches=0).fit(Project(), loader(), loader())
    assert not callback._collections


@pytest.mark.parametrize("estimator", ["flip", "ablation"])
def test_exact_estimators_need_losses_of_samples(tmp_path, estimator):
    metrics = [ImportanceVariance(estimator)]
    with pytest.raises(ValueError, match="need a loss that returns one value a sample"):
        validate(tmp_path, Project(), ToleranceMetrics(metrics))

    def losses(module, batch):
        return nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")

    logged = validate(tmp_path, Project(), ToleranceMetrics(metrics, loss=losses))
    assert logged["val/importance_variance/0"] > 0


def test_importance_can_be_limited_to_some_batches(tmp_path):
    some = validate(tmp_path, Project(), ToleranceMetrics(importance_batches=2))
    run = trainer(tmp_path, [ToleranceMetrics()], limit_val_batches=2)
    run.validate(Project(), loader(), verbose=False)
    assert some["val/importance/0"] == pytest.approx(float(run.callback_metrics["val/importance/0"]))


class Manual(Project):
    automatic_optimization = False


def test_a_module_that_optimizes_by_hand_needs_a_loss(tmp_path):
    with pytest.raises(ValueError, match=r"training_step of Manual optimizes: give ToleranceMetrics a loss="):
        validate(tmp_path, Manual())


def test_a_network_without_batch_norm_has_margins_against_zero(tmp_path):
    net = nn.Sequential(BinaryLinear(12, 8, bias=False), BinaryActivation(), BinaryLinear(8, 3, bias=False))
    module = Project(net)
    with pytest.warns(UserWarning, match=r"no batch norm .* of net.0: margins against zero"):
        logged = validate(tmp_path, module)
    assert logged["val/margin/0"] == pytest.approx(
        float(net[0](small_data().tensors[0]).abs().mean().detach()), rel=1e-5
    )


def test_a_network_without_binary_outputs_is_refused(tmp_path):
    net = nn.Sequential(BinaryLinear(12, 8), nn.ReLU(), BinaryLinear(8, 3))
    with pytest.raises(ValueError, match=r"finds no neuron outputs in Project \(net.0: .*name them with chains="):
        validate(tmp_path, Project(net))


def test_a_batch_norm_without_statistics_is_left_out_of_margins(tmp_path):
    net = small_net()
    net[1] = nn.BatchNorm1d(16, track_running_stats=False)
    with pytest.warns(UserWarning, match="net.1 has no running statistics"):
        logged = validate(tmp_path, Project(net))
    assert "val/margin/0" not in logged
    assert "val/importance_cv/0" in logged


def test_chains_can_be_named(tmp_path):
    logged = validate(tmp_path, Project(), ToleranceMetrics(chains={"0": ["net.1", "net.2"]}))
    assert logged == validate(tmp_path, Project())
    with pytest.raises(ValueError, match=r"'net.2' is no binarized layer; there are net\.0"):
        validate(tmp_path, Project(), ToleranceMetrics(chains={"net.2": ["net.1", "net.2"]}))
    with pytest.raises(ValueError, match=r"'fc9' names 0 modules of Project"):
        validate(tmp_path, Project(), ToleranceMetrics(chains={"fc9": ["net.1", "net.2"]}))
    with pytest.raises(ValueError, match="has no module 'bn1'"):
        validate(tmp_path, Project(), ToleranceMetrics(chains={"net.0": ["bn1", "net.2"]}))


class Positive(Metric):
    """A metric that somebody adds: the share of positive pre-activations."""

    def __init__(self):
        super().__init__()
        self.add_state("share", torch.zeros(()), dist_reduce_fx="mean")

    def update(self, preactivations):
        self.share = (preactivations > 0).float().mean()

    def compute(self):
        return {"positive": self.share}


def test_a_new_metric_needs_no_change_in_the_callback(tmp_path):
    logged = validate(tmp_path, Project(), ToleranceMetrics([Positive()]))
    assert {name for name in logged if "positive" in name} == {"val/positive/0", "val/positive/3"}


def test_an_error_while_watching_leaves_no_hook(tmp_path):
    class Breaking(Project):
        def validation_step(self, batch, batch_idx):
            raise RuntimeError("stumbled")

    module = Breaking()
    with pytest.raises(RuntimeError, match="stumbled"):
        validate(tmp_path, module)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"importance_batches": -1}, "importance_batches must be an integer >= 0 or None, got -1"),
        ({"chains": {"fc1": "sign1"}}, r"chains must map a layer to \[norm or None, activation\]"),
    ],
)
def test_bad_arguments_raise_at_construction(arguments, says):
    with pytest.raises(ValueError, match=says):
        ToleranceMetrics(**arguments)
