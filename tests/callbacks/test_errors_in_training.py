"""Every kind of error, schedule and target of BitFlipTraining trains as a plain loop that makes the flips by hand."""

import pytest
import torch
from by_hand import by_hand, flipped_weights
from leftovers import assert_nothing_left
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from networks import Manual, Project, SharpnessAware, equal_states, loader, small_net, state, trainer
from patterns import Centred, SignFunction
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from bnnft import flipped
from bnnft.ber import (
    Asymmetric,
    Chip,
    Clustered,
    Constant,
    Cosine,
    Curriculum,
    ErrorModel,
    Independent,
    Key,
    Linear,
    PerLayer,
    Sequence,
    Sram65,
    Steps,
    Uniform,
)
from bnnft.callbacks import BitFlipTraining
from bnnft.nn import BinaryActivation

MODELS = [
    Asymmetric(0.05, 0.3),
    Chip(0.2, chip=7),
    Chip(0.3, 7, "stuck_at"),
    Clustered(0.2, rows=8, columns=2),
    PerLayer({"*net.0*": Asymmetric(0.3, 0), "*": 0.05}),
    Sequence([Chip(0.1, chip=1), 0.1]),
    Sram65(0.5),
]


def fit(folder, callbacks, module=None, ckpt_path=None, **settings):
    module = Project() if module is None else module
    trainer(folder, callbacks, **settings).fit(module, loader(), ckpt_path=ckpt_path)
    return module


def foreign_net():
    """The network of Project, with layers that nobody knows."""
    net = small_net()
    for number in (0, 3, 6):
        layer = SignFunction(*net[number].weight.shape[::-1])
        layer.weight, net[number] = net[number].weight, layer
    return net


@pytest.mark.parametrize("how", ["auto", "latent"])
@pytest.mark.parametrize("net", [small_net, foreign_net])
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_errors_of_every_kind_are_those_of_a_plain_loop(tmp_path, model, net, how):
    """Also where the bits are read in the forward; layers that nobody knows are clean in their first batch."""
    ours = fit(tmp_path, [BitFlipTraining(model, how=how)], Project(net()))
    errors = model if net is small_net else lambda step: model if step else 0.0
    assert equal_states(state(ours), state(by_hand(errors)))
    assert not equal_states(state(ours), state(by_hand(0.0)))


def test_bits_are_read_where_they_are_made():
    """With a mean that is subtracted first, the latent's sign is not the bit: every one that is used becomes a zero."""
    layer, x = Centred(24, 16), torch.randn(4, 24)
    with torch.no_grad():
        layer.weight += 0.5 * layer.weight.std()
    clean = layer(x)
    with flipped(layer, Asymmetric(0, 1)) as flips:
        everything_low = layer(x)
    assert 0 < len(flips["weight"]) < layer.weight.numel()
    assert torch.allclose(everything_low, -x.sum(1, keepdim=True).expand(4, 16), atol=1e-5)
    assert not torch.allclose(everything_low, clean)


@pytest.mark.parametrize("schedule", [Constant(), Linear(8), Cosine(5), Steps({4: 0.5, 8: 1.0}), Uniform()], ids=str)
@pytest.mark.parametrize("model", [Independent(0.3), Chip(0.3, chip=2)], ids=str)
def test_a_schedule_moves_the_rate(tmp_path, schedule, model):
    ours = fit(tmp_path, [BitFlipTraining(model, schedule=schedule, seed=3)])
    assert equal_states(state(ours), state(by_hand(lambda step: model.scaled(schedule.factor(step, seed=3)), seed=3)))


class Losses(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        self.seen.append(float(outputs["loss"]))


def test_a_curriculum_begins_once_the_loss_is_low_also_after_a_cut(tmp_path):
    losses = Losses()
    fit(tmp_path, [losses], max_epochs=2)
    limit = sorted(losses.seen[1:6])[0] + 1e-6
    start = next(step for step, loss in enumerate(losses.seen) if loss < limit) + 1
    assert 1 < start < 8
    curriculum = Curriculum(limit, then=Linear(4, start=0.25))

    def go(folder, epochs, *more):
        callbacks = [BitFlipTraining(0.3, schedule=curriculum), ModelCheckpoint(tmp_path / folder, filename="at")]
        return fit(tmp_path, callbacks, *more, max_epochs=epochs, enable_checkpointing=True)

    whole = go("whole", 3)
    expected = by_hand(lambda step: 0.3 * curriculum.factor(step - start) if step >= start else 0.0, steps=18)
    assert equal_states(state(whole), state(expected))
    go("cut", 2)
    with pytest.warns(UserWarning, match="dirpath has changed"):
        resumed = go("resumed", 3, Project(small_net(9)), tmp_path / "cut" / "at.ckpt")
    assert equal_states(state(whole), state(resumed))


@pytest.mark.parametrize("layer", [Centred, SignFunction])
def test_the_first_batch_with_flips_is_proven_whenever_a_schedule_has_it_come(tmp_path, layer):
    """A centred layer, whose latent is not the bit, is refused; one that is looked at without flips would pass."""

    def module():
        torch.manual_seed(0)
        return Project(nn.Sequential(layer(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)))

    names, steps = ["net.0.weight"], Steps({5: 1.0})
    callback, ours = BitFlipTraining(0.3, weights=names, how="latent", schedule=steps), module()
    if layer is Centred:
        with pytest.raises(RuntimeError, match=r"drawn flips \(net\.0\.weight: its operand has other signs"):
            fit(tmp_path, [callback], ours)
    else:
        fit(tmp_path, [callback], ours)
        expected = by_hand(lambda step: 0.3 if step >= 5 else 0.0, module(), names=names)
        assert equal_states(state(ours), state(expected))


class LateSign(nn.Linear):
    """Binarizes the centred weight, but for the first steps, in which its latent is the bit: found as if it were."""

    calls = 0

    def forward(self, x):
        self.calls += self.training
        weight = self.weight if self.calls <= 3 else self.weight - self.weight.mean(1, keepdim=True)
        return nn.functional.linear(x, weight + (torch.copysign(torch.ones(()), weight) - weight).detach())


def test_a_named_layer_is_proven_in_its_first_batch_with_flips(tmp_path):
    """Without flips its first batches say nothing; this layer is centred from the fourth on."""
    net = nn.Sequential(LateSign(12, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    options = {"weights": ["net.0.weight"], "how": "latent"}
    fit(tmp_path, [BitFlipTraining(0.3, **options)], Project(net), limit_train_batches=3, max_epochs=1)
    net[0].calls = 0
    with pytest.raises(RuntimeError, match="do not compute with the drawn flips"):
        fit(tmp_path, [BitFlipTraining(0.3, schedule=Steps({5: 1.0}), **options)], Project(net))


def test_the_factor_is_logged_with_a_schedule_only(tmp_path):
    for schedule in (Linear(8), None, Constant()):
        logger = CSVLogger(tmp_path, name=str(schedule))
        fit(tmp_path, [BitFlipTraining(0.1, schedule=schedule)], logger=logger, log_every_n_steps=1)
        rows = (tmp_path / str(schedule) / "version_0" / "metrics.csv").read_text().splitlines()
        assert ("train/ber_factor" in rows[0]) == isinstance(schedule, Linear)


def test_the_loss_that_a_curriculum_waits_for_is_that_of_a_batch_also_under_accumulation(tmp_path):
    """Lightning hands it over divided by the number of batches."""
    losses = Losses()
    fit(tmp_path, [losses], max_epochs=1, accumulate_grad_batches=4)
    whole = [4 * loss for loss in losses.seen]
    for limit, start in ((2 * min(losses.seen), None), (min(whole) + 1e-6, whole.index(min(whole)) + 1)):
        callback = BitFlipTraining(0.3, schedule=Curriculum(limit))
        fit(tmp_path, [callback], max_epochs=1, accumulate_grad_batches=4)
        assert callback.state_dict()["start"] == start


@pytest.mark.parametrize("model", [0.2, 0.0, Asymmetric(0.05, 0.3)], ids=str)
def test_average_is_half_of_a_pass_with_flips_and_of_one_without(tmp_path, model):
    ours = fit(tmp_path, [BitFlipTraining(model, gradient="average")])
    gradient = "average" if model else "straight_through"
    assert equal_states(state(ours), state(by_hand(model, gradient=gradient)))


def test_average_logs_the_first_pass_and_goes_with_accumulation_and_clipping(tmp_path):
    """Accumulation over two batches is half of each; the norm that clips is that of the average."""
    losses, settings = Losses(), {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "max_epochs": 1}
    logger = CSVLogger(tmp_path)
    callbacks = [BitFlipTraining(0.2, gradient="average"), losses]
    ours = fit(tmp_path, callbacks, logger=logger, log_every_n_steps=1, **settings)
    header, *rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    logged = [float(row.split(",")[header.split(",").index("train/loss")]) for row in rows]
    # Lightning hands the loss over divided by two, and logs a value for each step, that of its last batch
    assert logged == pytest.approx([2 * loss for loss in losses.seen[1::2]], rel=1e-4)

    module = Project()
    module.train()
    optimizer, halves = module.configure_optimizers(), [0.25, 0.25]
    for step, (x, y) in enumerate(loader()):
        for share, errors in zip(halves, (0.2, 0.0), strict=True):
            weights = flipped_weights(module, errors, step)
            (share * nn.functional.cross_entropy(functional_call(module, weights, x), y)).backward()
        if step % 2:
            nn.utils.clip_grad_norm_(module.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(state(ours).values(), state(module).values(), strict=True)
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in pairs)


class BothPasses(Project):
    """Returns the mean loss of a pass with flips and one without, in its own code."""

    steps = 0

    def training_step(self, batch, batch_idx):
        weights = flipped_weights(self, 0.2, self.steps)
        scores = functional_call(self, weights, batch[0]), self(batch[0])
        return sum(nn.functional.cross_entropy(each, batch[1]) for each in scores) / 2

    def on_train_batch_end(self, *args):
        self.steps += 1


def test_average_is_taken_in_each_evaluation_of_an_optimizer_that_needs_several(tmp_path):
    def sharpness_aware(kind):
        module = kind()
        module.configure_optimizers = lambda: SharpnessAware(module.parameters(), lr=0.1)
        return module

    ours = state(fit(tmp_path, [BitFlipTraining(0.2, gradient="average")], sharpness_aware(Project)))
    expected, without = (state(fit(tmp_path, [], sharpness_aware(kind))) for kind in (BothPasses, Project))
    assert all(torch.allclose(value, expected[name], atol=1e-4) for name, value in ours.items())
    assert not all(torch.allclose(value, without[name], atol=1e-2) for name, value in ours.items())


def test_average_and_manual_optimization_exclude_each_other(tmp_path):
    with pytest.raises(RuntimeError, match="gradient='average' runs each batch twice"):
        fit(tmp_path, [BitFlipTraining(0.1, gradient="average")], Manual())


def test_a_curriculum_says_that_it_needs_a_loss(tmp_path):
    class Returns(Manual):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            return {"accuracy": 1.0}

    with pytest.raises(ValueError, match="Curriculum needs training_step to return the loss, got dict"):
        fit(tmp_path, [BitFlipTraining(0.1, schedule=Curriculum(0.5))], Returns())


class FlippedActivations(nn.Module):
    """A BinaryActivation with flips in its own code: signs are multiplied, gradients pass straight through."""

    def __init__(self, position, model, exact):
        super().__init__()
        self.position, self.model, self.exact, self.step = position, model, exact, -1
        self.activation = BinaryActivation()

    def forward(self, x):
        y = self.activation(x)
        if self.training and self.step >= 0:
            signs = torch.ones(y.numel())
            signs[self.model.flips(y.detach(), Key(0, self.step, self.position, "training"))] = -1
            signs = signs.view_as(y)
            return y * signs if self.exact else y + (y * signs - y).detach()
        return y


def with_flipped_activations(net, model, exact=False):
    """Put activations with flips in their own code in the places of the others."""
    parameters = 1 + len(list(net.parameters()))
    for number, layer in enumerate(net):
        if isinstance(layer, BinaryActivation):
            # after all parameters, in the order of modules: the project, its network, then the layers
            net[number] = FlippedActivations(parameters + 1 + number, model, exact)
    return net


class Stepped(Project):
    """Flips the weights too, if it is given their rate."""

    def __init__(self, net, rate=0.0):
        super().__init__(net)
        self.rate, self.step = rate, -1

    def forward(self, x):
        return functional_call(self.net, self.weights(), x) if self.training and self.rate else self.net(x)

    def weights(self):
        weights = flipped_weights(self, self.rate, self.step)
        return {name.removeprefix("net."): weight for name, weight in weights.items()}

    def on_train_batch_start(self, batch, batch_idx):
        self.step += 1
        for layer in self.net:
            if isinstance(layer, FlippedActivations):
                layer.step = self.step


@pytest.mark.parametrize("gradient", ["straight_through", "exact"])
@pytest.mark.parametrize("model", [Independent(0.2), Asymmetric(0, 0.3)], ids=str)
def test_activations_are_flipped_as_by_a_module_of_ones_own(tmp_path, model, gradient):
    ours = fit(tmp_path, [BitFlipTraining(model, target="activations", gradient=gradient)])
    expected = fit(tmp_path, [], Stepped(with_flipped_activations(small_net(), model, gradient == "exact")))
    assert equal_states(state(ours), state(expected))
    assert not equal_states(state(ours), state(fit(tmp_path, [])))


def test_both_targets_are_flipped_together(tmp_path):
    both = fit(tmp_path, [BitFlipTraining(0.2, target="both")])
    expected = fit(tmp_path, [], Stepped(with_flipped_activations(small_net(), Independent(0.2)), 0.2))
    assert equal_states(state(both), state(expected))
    two = [BitFlipTraining(0.2), BitFlipTraining(0.2, target="activations")]
    assert len({callback.state_key for callback in two}) == 2
    assert equal_states(state(both), state(fit(tmp_path, two)))


class Recomputing(Project):
    reentrant = False

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=self.reentrant)


class RecomputingReentrant(Recomputing):
    reentrant = True

    def forward(self, x):
        return super().forward(x.requires_grad_())


@pytest.mark.parametrize("net", [small_net, foreign_net])
@pytest.mark.parametrize("kind", [Project, Recomputing, RecomputingReentrant])
def test_recomputed_activations_and_weights_have_the_same_flips(tmp_path, kind, net):
    """Batch norm keeps no statistics, which a second forward would move."""

    def without_statistics(layers):
        layers[1], layers[4] = nn.BatchNorm1d(16, track_running_stats=False), nn.Identity()
        return layers

    ours = fit(tmp_path, [BitFlipTraining(0.2, target="both")], kind(without_statistics(net())))
    reference = Stepped(with_flipped_activations(without_statistics(small_net()), Independent(0.2)), 0.2)
    if net is foreign_net:  # clean weights in the first batch
        reference.weights = lambda: Stepped.weights(reference) if reference.step else {}
    assert equal_states(state(ours), state(fit(tmp_path, [], reference)))


@pytest.mark.parametrize("gradient", ["straight_through", "average"])
@pytest.mark.parametrize("fails_in", ["forward", "backward"])
def test_an_error_leaves_neither_flips_nor_hooks_behind(tmp_path, fails_in, gradient):
    """In the last forward or backward of the third batch: of the second pass, where there are two."""
    passes, calls = 2 if gradient == "average" else 1, []  # what the module keeps itself is of one pass

    class Failing(Project):
        def training_step(self, batch, batch_idx):
            calls.append(batch_idx)
            loss = super().training_step(batch, batch_idx)
            if len(calls) == 3 * passes:
                if fails_in == "forward":
                    raise ZeroDivisionError
                loss.register_hook(lambda gradient: 1 / 0)
            return loss

    module = Failing()
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, [BitFlipTraining(0.2, gradient=gradient)], module)
    expected = dict(by_hand(0.2, gradient=gradient, steps=2).named_parameters())
    assert all(torch.equal(weight, expected[name]) for name, weight in module.named_parameters())
    assert_nothing_left(module)

    module = Failing()
    calls.clear()
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, [BitFlipTraining(0.2, gradient=gradient, target="both")], module)
    assert_nothing_left(module)


class Other(nn.Module):
    def forward(self, x):
        return (x > 0).float()


def test_modules_of_others_are_named_and_must_be_binary(tmp_path):
    net = nn.Sequential(nn.Linear(12, 16), Other(), nn.Linear(16, 3), nn.ReLU())
    seen = []
    hooks = [net[1].register_forward_hook(lambda module, args, output: seen.append(output))]
    hooks.append(net[2].register_forward_pre_hook(lambda module, args: seen.append(args[0])))
    fit(tmp_path, [BitFlipTraining(0.1, target="activations", activations=["net.1"])], Project(net))
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2 * 12
    for step, (clean, wrong) in enumerate(zip(seen[::2], seen[1::2], strict=True)):
        flips = Independent(0.1).flips(clean, Key(0, step, 4 + 2 + 1, "training"))
        assert len(flips) > 0
        assert torch.equal((clean != wrong).flatten().nonzero().squeeze(1), flips)
    with pytest.raises(ValueError, match=r"the output of 'net.0' is not binary"):
        fit(tmp_path, [BitFlipTraining(0.1, target="activations", activations=["net.0"])], Project(net))
    with pytest.raises(ValueError, match=r"the pattern 'act' matches no module; there are net, net.0"):
        fit(tmp_path, [BitFlipTraining(0.1, target="activations", activations=["act"])], Project(net))
    with pytest.raises(ValueError, match=r"Project has no binary activation that is known"):
        fit(tmp_path, [BitFlipTraining(0.1, target="activations")], Project(net))


def test_patterns_of_a_layer_that_is_not_there_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"rates: the pattern '\*conv\*' matches no weight; there are net.0.weight"):
        fit(tmp_path, [BitFlipTraining(PerLayer({"*conv*": 0.1, "*": 0.2}))])


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"gradient": "mean"}, ValueError, "gradient must be one of straight_through, exact, average, got 'mean'"),
        ({"target": "neurons"}, ValueError, "target must be one of weights, activations, both, got 'neurons'"),
        ({"schedule": 0.5}, TypeError, "schedule must have a method factor"),
        ({"activations": "act", "target": "activations"}, TypeError, "activations must be a list of patterns"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, error, says):
    with pytest.raises(error, match=says):
        fit(tmp_path, [BitFlipTraining(0.1, **arguments)])


def test_a_schedule_needs_a_rate_to_move():
    class EveryOther(ErrorModel):
        def flips(self, weight, key):
            return torch.arange(0, weight.numel(), 2)

    with pytest.raises(TypeError, match="has no rate to set: it needs a field `rate` or a method `at_rate`"):
        BitFlipTraining(EveryOther(), schedule=Linear(5))
    BitFlipTraining(EveryOther(), schedule=Constant())
