"""In every way that Lightning can train, the flips are the drawn ones and the weights those of a run by hand."""

import pytest
import torch
from by_hand import by_hand, flipped_weights
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner
from networks import Project, SharpnessAware, equal_states, loader, small_net, state, trainer
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from bnnft.ber import Independent
from bnnft.callbacks import AccuracyOverBER, BitFlipTraining, ToleranceMetrics

RATE = 0.2


class Plain(Project):
    def forward(self, x):
        return self.run(x)

    def run(self, x):
        return self.net(x)


class ByHand(Plain):
    """The same project, with flips in its own code and no callback."""

    steps = 0
    flips = False

    def run(self, x):
        if not self.flips:
            return self.net(x)
        weights = flipped_weights(self, RATE, self.steps)
        return functional_call(self.net, {name.removeprefix("net."): weight for name, weight in weights.items()}, x)

    def on_train_batch_start(self, batch, batch_idx):
        self.flips = True

    def on_train_batch_end(self, *args):
        self.flips, self.steps = False, self.steps + 1


def fit(folder, module, callbacks=(), validate=False, **settings):
    run = trainer(folder, list(callbacks), **settings)
    run.fit(module, loader(shuffle=False), loader() if validate else None)
    return module


SETTINGS = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 4},
    "clipping by norm": {"gradient_clip_val": 0.05},
    "clipping by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "64-true": {"precision": "64-true"},
    "limits": {"limit_train_batches": 4, "limit_val_batches": 2, "validate": True},
    "overfit_batches": {"overfit_batches": 2},
    "fast_dev_run": {"fast_dev_run": 3, "validate": True},
    "validation within the epoch": {"val_check_interval": 2, "validate": True, "num_sanity_val_steps": 2},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_weights_are_bit_equal_to_flips_by_hand(tmp_path, settings):
    ours = fit(tmp_path, Project(), [BitFlipTraining(RATE)], **settings)
    assert equal_states(state(ours), state(fit(tmp_path, ByHand(), **settings)))
    assert not equal_states(state(ours), state(fit(tmp_path, Project(), **settings)))


class Compiled(Project):
    def forward(self, x):
        return self.compiled(x)

    def on_fit_start(self):
        self.__dict__["compiled"] = torch.compile(self.net, backend="aot_eager")  # not a submodule: keys stay plain


class Recomputing(Plain):
    def forward(self, x):
        return checkpoint(self.run, x, use_reentrant=False)


class TwoOptimizers(Plain):
    """The first layers have one optimizer and the last ones another, each with a forward and a step of its own."""

    automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[:3].parameters(), lr=0.1), torch.optim.Adam(self.net[3:].parameters())]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()


class ManualAccumulation(TwoOptimizers):
    def training_step(self, batch, batch_idx):
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        if batch_idx % 3 == 2:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()


class SkipsBatches(Plain):
    def training_step(self, batch, batch_idx):
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


class OwnOptimizer(TwoOptimizers):
    """Optimizers that Lightning does not see step."""

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers(use_pl_optimizer=False):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self(batch[0]), batch[1]).backward()
            optimizer.step()


class Closures(Plain):
    """Manual optimization that hands a closure to the optimizer."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


class WithLBFGS(Plain):
    """Evaluates a batch several times, from other weights each time."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class ManualLBFGS(Closures):
    configure_optimizers = WithLBFGS.configure_optimizers


class WithSharpnessAware(Plain):
    def configure_optimizers(self):
        return SharpnessAware(self.parameters(), lr=0.1)


class ManualSharpnessAware(Closures):
    configure_optimizers = WithSharpnessAware.configure_optimizers


class StepsByItself(Plain):
    """Writes its own update, past all optimizers and autograd."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        weights = list(self.parameters())
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.data -= 0.1 * gradient


MODULES = [Recomputing, TwoOptimizers, ManualAccumulation, OwnOptimizer, SkipsBatches, Closures, WithLBFGS, ManualLBFGS]
MODULES += [WithSharpnessAware, ManualSharpnessAware, StepsByItself]


@pytest.mark.filterwarnings("ignore:.*returned.*None")
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("how", ["auto", "latent"])
def test_any_training_step_gives_the_weights_of_flips_by_hand(tmp_path, kind, how):
    """In all evaluations of a batch, which see the same flips."""
    reference, callback = type("Reference", (ByHand, kind), {})(), BitFlipTraining(RATE, how=how)
    ours = state(fit(tmp_path, kind(), [callback]))
    assert {site.where for site in callback.training.injection.sites} == {"latent" if how == "latent" else "layer"}
    assert equal_states(ours, state(fit(tmp_path, reference)))
    assert not equal_states(ours, state(fit(tmp_path, kind())))


CALLBACKS = {
    "EMA": lambda: EMAWeightAveraging(decay=0.9, update_every_n_steps=1),
    "SWA": lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1),
}


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("averaging", CALLBACKS.values(), ids=CALLBACKS)
def test_averaged_weights_are_averages_of_clean_ones(tmp_path, averaging, first):
    callbacks = [averaging(), BitFlipTraining(RATE)]
    ours = fit(tmp_path, Project(), callbacks if first else callbacks[::-1], validate=True, max_epochs=3)
    reference = fit(tmp_path, ByHand(), [averaging()], validate=True, max_epochs=3)
    assert equal_states(state(ours), state(reference))


@pytest.mark.parametrize("how", ["auto", "latent", "operand"])
def test_compiled_modules_see_the_flips(tmp_path, how):
    ours = state(fit(tmp_path, Compiled(), [BitFlipTraining(RATE, how=how)]))
    expected = state(fit(tmp_path, ByHand()))
    assert all(torch.allclose(value, expected[name], atol=1e-6) for name, value in ours.items())


class Loading(Plain):
    """Loads its data itself, with a batch size that a tuner may change."""

    batch_size = 2

    def train_dataloader(self):
        return loader(self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def all_callbacks():
    return [BitFlipTraining(RATE), ToleranceMetrics(), AccuracyOverBER([0, 0.1, 0.3], maps=2)]


def test_evaluation_alone_changes_nothing(tmp_path):
    module, run = Loading(), trainer(tmp_path, all_callbacks())
    before = state(module)
    for evaluate in (run.validate, run.test):
        assert evaluate(module, verbose=False)
    assert run.callback_metrics["test/acc_ber_0p3"] != run.callback_metrics["test/acc_ber_0"]  # there were flips
    assert len(run.predict(module)) == 24
    assert equal_states(before, state(module))


@pytest.mark.filterwarnings("ignore:`weights_only` was not set")
@pytest.mark.parametrize("tune", ["scale_batch_size", "lr_find"])
def test_a_tuner_leaves_no_flip_and_no_draw_behind(tmp_path, tune):
    """After it weights are as before, and the run has the flips of one without a tuner."""
    module, run = Loading(), trainer(tmp_path, all_callbacks())
    before = state(module)
    if tune == "lr_find":
        Tuner(run).lr_find(module, num_training=5, update_attr=False)
    else:
        Tuner(run).scale_batch_size(module, max_trials=3, steps_per_trial=2)
        assert module.batch_size > 2
    assert equal_states(before, state(module))
    run.fit(module)
    data = loader(module.batch_size)
    assert equal_states(state(module), state(by_hand(RATE, steps=2 * len(data), data=data)))


def test_measuring_changes_nothing_of_the_training(tmp_path):
    """With it and without it weights are bit-equal, also where data are shuffled and networks draw random numbers."""

    def train(callbacks):
        module = Project(nn.Sequential(nn.Dropout(0.1), *small_net()))
        torch.manual_seed(3)
        run = trainer(tmp_path, callbacks)
        run.fit(module, loader(shuffle=True), loader())
        return state(module), run.callback_metrics

    errors = Independent(0.2)
    measuring = ToleranceMetrics(), AccuracyOverBER([0], error_model=errors, validation_maps=2)
    (plain, _), (measured, metrics), (without, _) = (
        train(callbacks) for callbacks in ([BitFlipTraining(RATE)], [BitFlipTraining(RATE), *measuring], [])
    )
    assert metrics["val/importance_cv/1"] > 0
    assert 0 < metrics["val/acc_faulty"] < 1
    assert equal_states(plain, measured)
    assert not equal_states(plain, without)


def test_a_trainer_of_the_other_package_takes_the_callbacks(tmp_path):
    """The same classes under the name pytorch_lightning."""
    other = pytest.importorskip("pytorch_lightning")
    kind = type("Other", (other.LightningModule,), dict(vars(Project)) | {"__init__": other.LightningModule.__init__})
    module = kind()
    module.net, module.lr = small_net(), 0.01
    run = trainer(tmp_path, all_callbacks(), other.Trainer)
    run.fit(module, loader(), loader())
    run.test(module, loader(), verbose=False)
    assert equal_states(state(module), state(by_hand(RATE)))
    assert "test/tolerable_ber" in run.callback_metrics


class SteppedInBackward(Plain):
    """Each parameter is updated as soon as it has its gradient."""

    automatic_optimization = False

    def configure_optimizers(self):
        for weight in self.parameters():
            weight.register_post_accumulate_grad_hook(self.step)

    @torch.no_grad()
    def step(self, weight):
        weight -= 0.1 * weight.grad
        weight.grad = None

    def training_step(self, batch, batch_idx):
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize("how", ["auto", "operand", "latent"])
def test_weights_that_are_updated_in_backward_have_their_flips(tmp_path, how):
    reference = type("Reference", (ByHand, SteppedInBackward), {})()
    ours = state(fit(tmp_path, SteppedInBackward(), [BitFlipTraining(RATE, how=how)]))
    assert equal_states(ours, state(fit(tmp_path, reference)))
    assert not equal_states(ours, state(fit(tmp_path, SteppedInBackward())))


class FullyShardedDataParallel(nn.Module):
    """Of the name of torch's, which needs processes."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def test_flattened_weights_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"can't work under FSDP1.*FSDP2 \(ModelParallelStrategy\) work"):
        fit(tmp_path, Project(FullyShardedDataParallel(small_net())), [BitFlipTraining(RATE)])
    module = Project()
    before = state(module)
    module.net[0].weight.ds_id = 0
    with pytest.raises(RuntimeError, match="can't work under DeepSpeed ZeRO-3"):
        fit(tmp_path, module, [BitFlipTraining(RATE)])
    assert equal_states(before, state(module))
