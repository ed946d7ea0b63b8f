import itertools
import warnings
from collections import deque

import pytest
import torch
from lightning import Callback
from networks import Project, equal_states, loader, small_data, small_net, state, trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from bnnft.callbacks import BitFlipTraining, ToleranceMetrics
from bnnft.metrics import ImportanceVariance, Margin, class_margin
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
    run = trainer(tmp_path, [ToleranceMetrics()], num_sanity_val_steps=2, limit_val_batches=0)
    run.fit(Project(), loader(), loader())
    assert not [name for name in run.callback_metrics if "margin" in name]


@pytest.mark.parametrize("estimator", ["flip", "ablation"])
def test_exact_estimators_need_losses_of_samples(tmp_path, estimator):
    metrics = [ImportanceVariance(estimator)]
    with pytest.warns(
        UserWarning, match=r"leaves out importance of net.0, .*need a loss that returns one value a sample"
    ):
        assert "val/importance/0" not in validate(tmp_path, Project(), ToleranceMetrics(metrics))

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


def test_importance_can_be_left_out(tmp_path):
    """Without it no loss is needed."""
    logged = validate(tmp_path, Manual(), ToleranceMetrics(importance=False))
    expected = validate(tmp_path, Project())
    assert logged == {name: value for name, value in expected.items() if "importance" not in name}


# what can't be measured is left out, with one warning that says why, and the rest is measured


class Bare(Project):
    def training_step(self, batch, batch_idx):
        return None


class Named(Project):
    def training_step(self, batch, batch_idx):
        return {"log": 1}


class Failing(Project):
    def training_step(self, batch, batch_idx):
        raise ArithmeticError("no such batch")


class Fetching(Project):
    def training_step(self, dataloader_iter):
        return super().training_step(next(dataloader_iter), 0)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Manual, "training_step of Manual optimizes: give loss="),
        (Bare, "training_step of Bare returned NoneType and no loss: give loss="),
        (Named, "training_step of Named returned NoneType and no loss"),
        (Failing, "no such batch"),
        (Fetching, "training_step of Fetching fetches its batches"),
    ],
)
def test_a_step_that_gives_no_loss_leaves_out_importance_alone(tmp_path, kind, says):
    with pytest.warns(UserWarning, match=f"leaves out importance: {says}") as warned:
        logged = validate(tmp_path, kind())
    assert len([each for each in warned if "ToleranceMetrics" in str(each.message)]) == 1
    expected = validate(tmp_path, Project(), ToleranceMetrics(importance=False))
    assert logged == expected


def test_a_network_without_batch_norm_has_margins_against_zero(tmp_path):
    net = nn.Sequential(BinaryLinear(12, 8, bias=False), BinaryActivation(), BinaryLinear(8, 3, bias=False))
    module = Project(net)
    with pytest.warns(UserWarning, match=r"no batch norm .* of net.0: margins against zero"):
        logged = validate(tmp_path, module)
    assert logged["val/margin/0"] == pytest.approx(
        float(net[0](small_data().tensors[0]).abs().mean().detach()), rel=1e-5
    )


def layers(*between, last=None):
    return nn.Sequential(
        BinaryLinear(12, 8, bias=False), *between, last or BinaryLinear(8, 3, bias=False), BinaryLinear(3, 3)
    )


class Tokens(nn.Module):
    """Repeats each sample as three tokens."""

    def forward(self, x):
        return x[:, None].repeat(1, 3, 1)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


class Threefold(BinaryLinear):
    """A layer with a scale for each neuron."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.sign() * self.weight.abs().mean(1, keepdim=True).detach())


@pytest.mark.parametrize(
    ("net", "says", "measured"),
    [
        pytest.param(
            nn.Sequential(BinaryLinear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), BinaryLinear(8, 3)),
            r"margins and importance of net.0: its outputs are not binary",
            {"val/class_margin/3"},
            id="real activations",
        ),
        pytest.param(
            nn.Sequential(
                BinaryLinear(12, 8),
                nn.BatchNorm1d(8, track_running_stats=False),
                BinaryActivation(),
                BinaryLinear(8, 3),
            ),
            "net.1 has no running statistics",
            {"val/importance/0", "val/class_margin/3"},
            id="no statistics",
        ),
        pytest.param(
            nn.Sequential(Tokens(), Threefold(12, 8), BinaryActivation(), nn.Linear(8, 3), Mean()),
            "no batch norm between layer and neurons of net.1",
            {"val/margin/1", "val/importance/1"},
            id="tokens with a scale",
        ),
        pytest.param(
            nn.Sequential(Tokens(), BinaryLinear(12, 8), nn.ReLU(), BinaryLinear(8, 3), Mean()),
            "class margin of net.3: mean makes other class scores of its outputs",
            set(),
            id="scores of tokens",
        ),
        pytest.param(
            nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)),
            "all metrics of Project: it computes with no binarized weights",
            set(),
            id="nothing binarized",
        ),
    ],
)
@pytest.mark.parametrize("fits", [False, True])
def test_what_cannot_be_measured_ends_no_run(tmp_path, net, says, measured, fits):
    """In a fit, where nothing is to be raised, it is said in the first epoch and not again."""
    run = trainer(tmp_path, [ToleranceMetrics()], num_sanity_val_steps=0)
    module, arguments = Project(net), (loader(), loader()) if fits else (loader(),)
    with pytest.warns(UserWarning, match=says) as warned:
        (run.fit if fits else run.validate)(module, *arguments)
    said = [str(each.message) for each in warned if "ToleranceMetrics" in str(each.message)]
    assert len(said) == len(set(said))
    kinds = {"val/margin/1", "val/margin/0", "val/importance/0", "val/importance/1", "val/class_margin/3"}
    assert kinds & run.callback_metrics.keys() == measured


class OneOutput(Project):
    def __init__(self):
        super().__init__(nn.Sequential(*small_net()[:6], BinaryLinear(16, 1, bias=False)))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]).squeeze(1), batch[1].float())

    validation_step = training_step


def test_a_regression_has_no_class_margin(tmp_path):
    with pytest.warns(UserWarning, match=r"class margin of net.6: its outputs have shape \(8, 1\)"):
        logged = validate(tmp_path, OneOutput())
    assert logged["val/margin/0"] > 0
    assert logged["val/importance/3"] > 0
    assert not [name for name in logged if "class_margin" in name]


def test_values_that_are_no_numbers_are_counted_apart(tmp_path):
    x, y = small_data().tensors
    broken = x.clone()
    broken[0, 0], broken[9, 1] = float("inf"), float("nan")
    rest = [number for number in range(len(x)) if number not in (0, 9)]

    def losses(module, batch):
        scores = nn.functional.cross_entropy(module(batch[0].nan_to_num(0, 0)), batch[1], reduction="none")
        return scores / batch[0].isfinite().all(1)  # without a limit for the broken samples

    module, results = Project(), []
    for inputs, targets in ((broken, y), (x[rest], y[rest])):
        run = trainer(tmp_path, [ToleranceMetrics(loss=losses)])
        run.validate(module, DataLoader(TensorDataset(inputs, targets), 8), verbose=False)
        results.append({name: float(value) for name, value in run.callback_metrics.items()})
    for name in ("margin/0", "margin_below_2/0", "importance/0", "importance_cv/3"):
        assert results[0][f"val/{name}"] == pytest.approx(results[1][f"val/{name}"], rel=1e-4)
    for name in ("margin_nonfinite/0", "importance_nonfinite/0"):
        assert results[0][f"val/{name}"] == pytest.approx(2 / len(x))
        assert results[1][f"val/{name}"] == 0


class TwoTasks(Project):
    """Each batch runs one of two heads, and the second one comes late and seldom."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(small_net(seed, inputs=16)[:7] for seed in (1, 2))
        self.body = small_net(3)[:3]
        del self.net
        self.batches = []

    def forward(self, x):
        return self.heads[int(x[0, 0] == 7)](self.body(x))


def test_batches_without_some_layers_measure_the_others(tmp_path):
    """Margins are those of the batches in which a layer ran, whichever came first."""
    x, y = small_data(samples=96).tensors
    late = [5, 6, 11]
    for batch in late:
        x[8 * batch, 0] = 7
    module = TwoTasks().eval()
    run = trainer(tmp_path, [ToleranceMetrics()])
    run.validate(module, DataLoader(TensorDataset(x, y), 8), verbose=False)
    parts = x.split(8)
    for head in (0, 1):
        own = torch.cat([part for number, part in enumerate(parts) if (number in late) == bool(head)])
        with torch.no_grad():
            margins = module.heads[head][0](module.body(own)).abs()
        assert float(run.callback_metrics[f"val/margin/heads_{head}_0"]) == pytest.approx(
            float(margins.mean()), rel=1e-5
        )


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_block_beside_is_let_pass(tmp_path):
    scripted = torch.jit.script(nn.Sequential(nn.Linear(12, 12), nn.ReLU()))
    module = Project(nn.Sequential(scripted, *small_net()))
    logged = validate(tmp_path, module)
    assert logged["val/margin/1"] > 0
    assert logged["val/importance_cv/4"] > 0


class Growing(Project):
    """Gets another layer after the first epoch."""

    def on_train_epoch_end(self):
        self.net = nn.Sequential(*small_net()[:3], *small_net(5, inputs=16)[:3], *self.net[3:])


def test_layers_that_change_between_epochs_are_found_anew(tmp_path):
    module, seen = Growing(), []

    class Noting(ToleranceMetrics):
        def on_validation_end(self, trainer, pl_module):
            seen.append({name for name in trainer.callback_metrics if "val/margin/" in name})

    trainer(tmp_path, [Noting()], num_sanity_val_steps=0, max_epochs=2).fit(module, loader(), loader())
    assert seen[0] == {"val/margin/0", "val/margin/3"}
    assert seen[1] >= {"val/margin/0", "val/margin/3", "val/margin/6"}


class Iterable(IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter([(x, y) for x, y in loader()][: self.batches])


@pytest.mark.filterwarnings("ignore:Total length of")
def test_a_pass_without_data_measures_nothing(tmp_path):
    run = trainer(tmp_path, [ToleranceMetrics()])
    run.validate(Project(), DataLoader(Iterable(0), batch_size=None), verbose=False)
    assert not run.callback_metrics


# measuring changes nothing


class Keeping(Project):
    """Keeps what people keep: an average of weights, a counter, losses, a queue, a generator of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("ema", self.net[0].weight.detach().clone())
        self.register_buffer("steps", torch.zeros(()))
        self.losses, self.queue, self.calls = [], deque(maxlen=3), 0
        self.generator = torch.Generator().manual_seed(1)

    def training_step(self, batch, batch_idx):
        self.ema.lerp_(self.net[0].weight.detach(), 0.1)
        self.ema.data.add_(0.01)
        self.steps += 1
        self.calls += 1
        x, y = batch
        loss = super().training_step((x + 0.1 * torch.randn(x.shape, generator=self.generator), y), batch_idx)
        self.losses.append(loss.detach())
        self.queue.append(loss.item())
        return loss


@pytest.mark.parametrize("estimator", ["gradient", "flip"])
def test_what_a_step_keeps_is_as_without_measuring(tmp_path, estimator):
    def fit(callbacks):
        torch.manual_seed(0)
        module = Keeping()
        trainer(tmp_path, callbacks, val_check_interval=2, max_epochs=1).fit(module, loader(shuffle=True), loader())
        return module

    def losses(module, batch):
        module.training_step(batch, 0)
        return nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")

    measuring = ToleranceMetrics([ImportanceVariance(estimator)], loss=losses, importance_batches=1)
    measured, plain = fit([measuring]), fit([])
    assert equal_states(state(measured), state(plain))
    assert measured.calls == plain.calls == 6
    assert measured.queue == plain.queue
    assert torch.equal(torch.stack(measured.losses), torch.stack(plain.losses))
    assert torch.equal(measured.generator.get_state(), plain.generator.get_state())


def test_what_cannot_be_put_back_is_said_once_by_name(tmp_path):
    class Iterating(Project):
        def __init__(self):
            super().__init__()
            self.numbers = itertools.count()

        def training_step(self, batch, batch_idx):
            next(self.numbers)
            return super().training_step(batch, batch_idx)

    run = trainer(tmp_path, [ToleranceMetrics()])
    with pytest.warns(
        UserWarning, match="cannot put back what the loss has moved: numbers; .*importance=False"
    ) as warned:
        run.fit(Iterating(), loader(), loader())
    assert len([each for each in warned if "put back" in str(each.message)]) == 1


class TrainModeNorm(Project):
    def validation_step(self, batch, batch_idx):
        self.net[1].train()
        super().validation_step(batch, batch_idx)


def test_a_batch_norm_in_train_mode_within_evaluation_keeps_its_statistics(tmp_path):
    def validated(callbacks):
        module = TrainModeNorm()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "ToleranceMetrics leaves out margins of net.0")
            trainer(tmp_path, callbacks).validate(module, loader(), verbose=False)
        return state(module)

    assert equal_states(validated([ToleranceMetrics()]), validated([]))


def test_chains_can_be_named(tmp_path):
    logged = validate(tmp_path, Project(), ToleranceMetrics(chains={"0": ["net.1", "net.2"]}))
    assert logged == pytest.approx(validate(tmp_path, Project()))
    for chains, says in (
        ({"net.2": ["net.1", "net.2"]}, r"'net.2' is no binarized layer; there are net\.0"),
        ({"fc9": ["net.1", "net.2"]}, r"'fc9' names 0 modules of Project"),
        ({"net.0": ["bn1", "net.2"]}, "has no module 'bn1'"),
    ):
        with pytest.raises(ValueError, match=says):
            validate(tmp_path, Project(), ToleranceMetrics(chains=chains))
    with pytest.raises(ValueError, match="matches no parameter"):
        validate(tmp_path, Project(), ToleranceMetrics(weights=["fc9"]))


def test_chains_without_a_norm_have_margins_against_zero(tmp_path):
    """An addition between hides the threshold; whoever names the activation vouches for it."""
    net = nn.Sequential(BinaryLinear(12, 8, bias=False), Shift(), BinaryActivation(), BinaryLinear(8, 3, bias=False))
    with pytest.warns(UserWarning, match="margins of net.0: something is added to it"):
        assert "val/margin/0" not in validate(tmp_path, Project(net))
    with pytest.warns(UserWarning, match="margins against zero"):
        logged = validate(tmp_path, Project(net), ToleranceMetrics(chains={"0": [None, "net.2"]}))
    with torch.no_grad():
        expected = net[0](small_data().tensors[0]).abs().mean()
    assert logged["val/margin/0"] == pytest.approx(float(expected), rel=1e-5)
    assert logged["val/importance/0"] > 0


class Shift(nn.Module):
    def forward(self, x):
        return x + 1


def test_named_modules_that_other_layers_run_are_refused(tmp_path):
    net = small_net()
    net[5] = net[2]
    with pytest.warns(UserWarning, match="net.2 runs more or less often than the layer"):
        logged = validate(tmp_path, Project(net), ToleranceMetrics(chains={"net.0": ["net.1", "net.2"]}))
    assert "val/margin/0" not in logged
    assert logged["val/margin/3"] > 0


# names


def test_two_callbacks_log_apart_by_their_names(tmp_path):
    run = trainer(tmp_path, [ToleranceMetrics(), ToleranceMetrics(name="again")])
    run.validate(Project(), loader(), verbose=False)
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    alone = validate(tmp_path, Project())
    own = {name for name in alone if name != "val/loss"}
    assert logged.keys() == alone.keys() | {name.replace("val/", "val/again_") for name in own}
    assert all(logged[name] == logged[name.replace("val/", "val/again_")] == alone[name] for name in own)


class Running(Callback):
    """Runs the module when a batch ends, as callbacks that draw pictures do."""

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *args):
        pl_module(10 * batch[0])
        pl_module.validation_step(batch, 0)


@pytest.mark.parametrize("first", [False, True])
def test_what_other_callbacks_run_is_not_measured(tmp_path, first):
    callbacks = [Running(), ToleranceMetrics()] if first else [ToleranceMetrics(), Running()]
    run = trainer(tmp_path, callbacks)
    run.validate(Project(), loader(), verbose=False)
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    assert logged == validate(tmp_path, Project())


@pytest.mark.parametrize("at", ["start", "step", "end"])
def test_no_step_is_left_in_the_place_of_the_modules_own(tmp_path, at):
    """With two callbacks, whenever the run is cut."""

    class Cutting(Callback):
        def on_validation_batch_start(self, *args):
            if at == "start":
                raise ArithmeticError

        def on_validation_batch_end(self, *args):
            if at == "end":
                raise ArithmeticError

    class Step(Project):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if at == "step":
                raise ArithmeticError

    module = Step()
    for cutting in ([ToleranceMetrics(), ToleranceMetrics(name="b"), Cutting()], [Cutting(), ToleranceMetrics()]):
        with pytest.raises(ArithmeticError):
            trainer(tmp_path, cutting).validate(module, loader(), verbose=False)
        assert "validation_step" not in vars(module)
        assert not torch.overrides._get_current_function_mode_stack()


def test_a_step_that_is_an_attribute_of_the_module_stays(tmp_path):
    module = Project()
    module.validation_step = step = lambda batch, batch_idx: module(batch[0])
    logged = validate(tmp_path, module)
    assert module.validation_step is step
    assert logged["val/margin/0"] > 0


def test_two_callbacks_that_would_log_under_the_same_names_are_refused(tmp_path):
    for name in (None, "mine"):
        with pytest.raises(ValueError, match="two ToleranceMetrics log under the same names: give one a name="):
            trainer(tmp_path, [ToleranceMetrics(name=name), ToleranceMetrics(name=name)]).validate(Project(), loader())
    both = [ToleranceMetrics([Margin()]), ToleranceMetrics([ImportanceVariance()])]
    trainer(tmp_path, both).validate(Project(), loader(), verbose=False)


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
    assert not torch.overrides._get_current_function_mode_stack()


def test_one_callback_measures_a_second_run_as_the_first_one_after_an_error(tmp_path):
    class Breaking(Project):
        broken = True

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if self.broken and batch_idx == 3:
                raise RuntimeError("stumbled")

    callback, module = ToleranceMetrics(), Breaking()
    with pytest.raises(RuntimeError, match="stumbled"):
        validate(tmp_path, module, callback)
    module.broken = False
    assert validate(tmp_path, module, callback) == validate(tmp_path, Project())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "val/mine"}, "name must be a word or None, got 'val/mine'"),
        ({"metrics": [Margin(), Margin()]}, "metrics must be of different classes, got Margin 2 times"),
        ({"importance_batches": -1}, "importance_batches must be an integer >= 0 or None, got -1"),
        ({"chains": {"fc1": "sign1"}}, r"chains must map a layer to \[norm or None, activation\]"),
    ],
)
def test_bad_arguments_raise_at_construction(arguments, says):
    with pytest.raises(ValueError, match=says):
        ToleranceMetrics(**arguments)
