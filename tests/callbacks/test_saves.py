"""Whatever is saved in the middle of training, from any hook of another callback: clean, and good to go on from."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from by_hand import NAMES, by_hand
from leftovers import hooks_in
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import Manual, Project, small_data, small_net, state, trainer
from patterns import SignFunction
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bnnft.callbacks import BitFlipTraining

RATE = 0.3
AT = 3  # number of the batch in which is saved, from 0 on

either_order = pytest.mark.parametrize("first", [True, False])
HOOKS = {  # with the number of batches that are done then
    "on_train_batch_start": AT,
    "on_before_zero_grad": AT,
    "on_before_backward": AT,
    "on_after_backward": AT,
    "on_before_optimizer_step": AT,
    "on_train_batch_end": AT + 1,
}


def loader():
    """Six equal batches, since Lightning starts the data again where a run goes on within an epoch."""
    x, y = small_data()[:8]
    return DataLoader(TensorDataset(x.repeat(6, 1), y.repeat(6)), batch_size=8)


class Acts(Callback):
    """Does something in a hook of one batch."""

    def __init__(self, hook, action):
        self.action, self.done = action, 0
        setattr(self, hook, self._act)

    def _act(self, trainer, module, *args):
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready == AT + 1:
            self.action(trainer, module)
            self.done += 1


def foreign_net(seed=0):
    """The network of Project, with layers that nobody knows."""
    net = small_net(seed)
    for number in (0, 3, 6):
        layer = SignFunction(*net[number].weight.shape[::-1])
        layer.weight, net[number] = net[number].weight, layer
    return net


def fit(folder, callbacks, module, ckpt_path=None, **settings):
    trainer(folder, callbacks, **settings).fit(module, loader(), ckpt_path=ckpt_path)
    return module


def expected(steps, net=small_net):
    """Weights after so many steps by hand; layers that nobody knows are clean in the first batch."""
    errors = RATE if net is small_net else lambda step: RATE if step else 0.0
    module = by_hand(errors, steps=steps, data=loader())
    return {name: module.get_parameter(name).detach() for name in NAMES}


def same(module, weights):
    return all(torch.equal(module.get_parameter(name), weight) for name, weight in weights.items())


def save(folder, hook, first, action, how, module, net):
    """Train one epoch with an action in one hook; it changes nothing."""
    acts, training = Acts(hook, action), BitFlipTraining(RATE, how=how)
    fit(folder, [acts, training] if first else [training, acts], module, max_epochs=1)
    assert acts.done == 1
    assert same(module, expected(6, net))


@pytest.mark.parametrize(("how", "net"), [("auto", small_net), ("auto", foreign_net), ("latent", small_net)])
@either_order
@pytest.mark.parametrize("hook", HOOKS)
def test_states_copies_and_pickles_are_clean(tmp_path, hook, first, how, net):
    """Their weights are those after so many steps by hand, and copies carry neither flips nor hooks."""
    states, copies = [], []

    def keep(trainer, module):
        states.append(state(module))
        copies.extend([copy.deepcopy(module.net), pickle.loads(pickle.dumps(module.net))])

    save(tmp_path, hook, first, keep, how, Project(net()), net)
    weights, x = expected(HOOKS[hook], net), small_data()[:][0]
    assert all(torch.equal(states[0][name], weight) for name, weight in weights.items())
    assert len(copies) == 2
    for each in copies:
        assert same(nn.ModuleDict({"net": each}), weights)
        each(x)  # a hook of the batch that came along takes itself away
        assert hooks_in(each) == 0
        assert torch.equal(each[0](x), F.linear(x, weights["net.0.weight"].sign()))


CASES = [(Project, "auto", small_net), (Project, "auto", foreign_net), (Project, "latent", small_net)]
CASES += [(Manual, "auto", small_net)]


@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before")
@pytest.mark.parametrize(("kind", "how", "net"), CASES)
@either_order
@pytest.mark.parametrize("hook", HOOKS)
def test_a_run_that_goes_on_from_a_checkpoint_is_the_uncut_one(tmp_path, hook, first, how, kind, net):
    """With new objects, and other weights at the start: a batch that was not done comes again, with its flips."""
    path = tmp_path / "mid.ckpt"
    if kind is Manual and hook == "on_before_zero_grad":
        pytest.skip("not called in manual optimization")
    save(tmp_path, hook, first, lambda trainer, module: trainer.save_checkpoint(path), how, kind(net()), net)
    saved = torch.load(path, weights_only=True)
    (draws,) = (each["draws"] for name, each in saved["callbacks"].items() if name.startswith("BitFlipTraining"))
    assert draws == HOOKS[hook]
    assert all(torch.equal(saved["state_dict"][name], weight) for name, weight in expected(draws, net).items())
    resumed = fit(tmp_path, [BitFlipTraining(RATE, how=how)], kind(net(9)), path)
    assert same(resumed, expected(12, net))


class Breaks(Project):
    """Fails in the middle of a batch, as often as it comes."""

    def __init__(self, where, net, fails=True):
        super().__init__(net)
        self.where, self.fails = where, fails

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.fails and self.global_step == AT:
            if self.where == "forward":
                raise ZeroDivisionError
            loss.register_hook(lambda gradient: 1 / 0)
        return loss


@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before", "ignore:The dirpath has changed")
@pytest.mark.parametrize("gradient", ["straight_through", "average"])
@pytest.mark.parametrize("where", ["forward", "backward"])
@either_order
def test_a_run_that_goes_on_from_what_was_saved_at_an_error_is_the_uncut_one(tmp_path, where, first, gradient):
    def callbacks(folder):
        saves = ModelCheckpoint(tmp_path / folder, filename="{step}", save_on_exception=True)
        training = BitFlipTraining(RATE, gradient=gradient)
        return [saves, training] if first else [training, saves]

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, callbacks("cut"), Breaks(where, small_net()), enable_checkpointing=True)
    (path,) = (tmp_path / "cut").glob("*.ckpt")
    resumed = fit(tmp_path, callbacks("on"), Breaks(where, small_net(9), fails=False), path, enable_checkpointing=True)
    reference = by_hand(RATE, gradient=gradient, data=loader())
    assert same(resumed, {name: reference.get_parameter(name) for name in NAMES})


class SavesWithinTheStep(Project):
    """As a handler of a signal may do at any time."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.global_step == AT and not self.path.exists():
            self.trainer.save_checkpoint(self.path, weights_only=self.weights_only)
        return loss


@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before")
@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("how", ["auto", "latent"])
def test_a_save_in_the_middle_of_a_forward_is_clean_and_goes_on(tmp_path, how, weights_only):
    module = SavesWithinTheStep()
    module.path, module.weights_only = tmp_path / "step.ckpt", weights_only
    fit(tmp_path, [BitFlipTraining(RATE, how=how)], module)
    assert same(module, expected(12))
    saved = torch.load(module.path, weights_only=True)
    assert all(torch.equal(saved["state_dict"][name], weight) for name, weight in expected(AT).items())
    if not weights_only:
        assert same(fit(tmp_path, [BitFlipTraining(RATE, how=how)], Project(small_net(9)), module.path), expected(12))
