"""In every way that Lightning can train, the flips are the drawn ones and the weights those of a run by hand."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from networks import Project, equal_states, loader, state, trainer
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from bnnft.ber import Independent, Key
from bnnft.callbacks import BitFlipTraining
from bnnft.injection import draw_flips
from bnnft.sites import find_sites

RATE = 0.2


def turned(net, step):
    """Weights with the flips of a step, made by multiplication and without a write; gradients pass straight through."""
    sites, weights = find_sites(net), {}
    # positions count all parameters of the module, and the network is all that these modules have
    for name, indices in draw_flips(sites, Independent(RATE), Key(0, step, purpose="training")).items():
        weight = net.get_parameter(name)
        change = torch.zeros_like(weight).view(-1)
        change[indices] = -2 * weight.detach().view(-1)[indices]
        weights[name] = weight + change.view_as(weight)
    return weights


class Plain(Project):
    def forward(self, x):
        return self.run(x)

    def run(self, x):
        return self.net(x)


class ByHand(Plain):
    """The same project, with flips in its own code and no callback."""

    steps = 0
    flips = False
    first = 0  # step that has flips

    def run(self, x):
        return functional_call(self.net, turned(self.net, self.steps), x) if self.flips else self.net(x)

    def on_train_batch_start(self, batch, batch_idx):
        self.flips = self.steps >= self.first

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


MODULES = [Recomputing, TwoOptimizers, ManualAccumulation, SkipsBatches, Closures]


@pytest.mark.filterwarnings("ignore:.*returned.*None")
@pytest.mark.parametrize("kind", MODULES)
def test_any_training_step_gives_the_weights_of_flips_by_hand(tmp_path, kind):
    reference = type("Reference", (ByHand, kind), {})()
    ours = fit(tmp_path, kind(), [BitFlipTraining(RATE)])
    assert equal_states(state(ours), state(fit(tmp_path, reference)))


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


@pytest.mark.parametrize("how", ["latent", "operand"])
def test_compiled_modules_see_the_flips(tmp_path, how):
    """Where flips go into operands, all layers are found by watching, and the first batch is clean."""
    ours, reference = state(fit(tmp_path, Compiled(), [BitFlipTraining(RATE, how=how)])), ByHand()
    reference.first = how == "operand"
    expected = state(fit(tmp_path, reference))
    assert all(torch.allclose(value, expected[name], atol=1e-6) for name, value in ours.items())
