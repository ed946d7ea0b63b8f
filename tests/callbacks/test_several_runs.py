"""One callback in several runs, one after the other, and several runs at the same time."""

import threading

import pytest
import torch
from by_hand import by_hand
from leftovers import assert_nothing_left
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import Manual, Project, equal_states, loader, small_net, state, trainer
from patterns import SignFunction
from torch import nn

from bnnft.callbacks import BitFlipTraining
from bnnft.injection.training import BitFlips

RATE = 0.2


def fit(folder, callbacks, module=None, ckpt_path=None, **settings):
    module = Project() if module is None else module
    trainer(folder, callbacks, **settings).fit(module, loader(), ckpt_path=ckpt_path)
    return module


def test_one_callback_starts_afresh_in_each_fit(tmp_path):
    """Of the same module, of another one, and of one with other layers."""
    callback, first = BitFlipTraining(RATE), Project()
    fit(tmp_path, [callback], first)
    assert equal_states(state(first), state(by_hand(RATE)))
    reference = by_hand(RATE, by_hand(RATE))  # the second fit has the flips of the first batches again
    fit(tmp_path, [callback], first)
    assert equal_states(state(first), state(reference))
    second = fit(tmp_path, [callback], Project(small_net(4)))
    assert equal_states(state(second), state(by_hand(RATE, Project(small_net(4)))))
    torch.manual_seed(0)
    foreign = [Project(nn.Sequential(SignFunction(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)))]
    foreign.append(Project(nn.Sequential(SignFunction(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))))
    foreign[1].load_state_dict(foreign[0].state_dict())
    fit(tmp_path, [callback], foreign[0])
    expected = by_hand(lambda step: RATE if step else 0.0, foreign[1], names=["net.0.weight"])
    assert equal_states(state(foreign[0]), state(expected))


def test_one_callback_starts_afresh_after_a_fit_that_failed(tmp_path):
    class Fails(Project):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    callback = BitFlipTraining(RATE)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, [callback], Fails())
    assert equal_states(state(fit(tmp_path, [callback])), state(by_hand(RATE)))


def cut_after_the_first_epoch(folder):
    """Return the trainer, its callbacks, and the checkpoint."""
    callbacks = [BitFlipTraining(RATE), ModelCheckpoint(folder, filename="at")]
    run = trainer(folder, callbacks, max_epochs=1, enable_checkpointing=True)
    run.fit(Project(), loader())
    return run, callbacks, folder / "at.ckpt"


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("again", ["trainer", "callback", "nothing"])
def test_a_resumed_run_goes_on_with_the_flips(tmp_path, again):
    """With the same objects or with new ones, and with another module, with other weights at the start."""
    run, callbacks, path = cut_after_the_first_epoch(tmp_path)
    resumed = Project(small_net(9))
    if again == "trainer":
        run.fit_loop.max_epochs = 3
        run.fit(resumed, loader(), ckpt_path=path)
    else:
        callbacks = callbacks[:1] if again == "callback" else [BitFlipTraining(RATE)]
        fit(tmp_path, callbacks, resumed, path, max_epochs=3)
    assert equal_states(state(resumed), state(by_hand(RATE, steps=18)))
    assert not equal_states(state(resumed), state(by_hand(0.0, steps=18)))


def test_a_run_that_resumes_into_a_model_without_its_sites_says_so(tmp_path):
    """By their names, where flips were and are not to be found."""
    _, _, path = cut_after_the_first_epoch(tmp_path)
    (states,) = (
        each
        for name, each in torch.load(path, weights_only=True)["callbacks"].items()
        if name.startswith("BitFlipTraining")
    )
    training = BitFlips(Project(small_net()[:3]), RATE)
    with pytest.raises(ValueError, match=r"has flips in net\.3\.weight, net\.6\.weight, but Project has no such"):
        training.load_state_dict(states)
    other = BitFlips(Project(small_net(9)), RATE)
    other.load_state_dict(states)
    assert other.batches == 6
    assert [site.name for site in other.injection.sites] == ["net.0.weight", "net.3.weight", "net.6.weight"]


class WithBarrier(Project):
    """Waits in each step for the other thread, so that both are in the middle of a batch."""

    barrier = None

    def training_step(self, batch, batch_idx):
        self.barrier.wait(timeout=60)
        loss = super().training_step(batch, batch_idx)
        self.barrier.wait(timeout=60)
        return loss


class ManualWithBarrier(Manual, WithBarrier):
    pass


def foreign_net(seed):
    net = small_net(seed)
    for number in (0, 3, 6):
        layer = SignFunction(*net[number].weight.shape[::-1])
        layer.weight, net[number] = net[number].weight, layer
    return net


@pytest.mark.parametrize("kind", [WithBarrier, ManualWithBarrier])
@pytest.mark.parametrize(("how", "net"), [("auto", small_net), ("auto", foreign_net), ("latent", small_net)])
def test_two_runs_in_two_threads_have_the_flips_of_each_alone(tmp_path, how, net, kind):
    """Their batches overlap; neither sees anything of the other."""
    barrier, modules, errors = threading.Barrier(2), [kind(net(seed)) for seed in (0, 4)], []

    def train(number):
        modules[number].barrier = barrier
        try:
            fit(tmp_path / str(number), [BitFlipTraining(RATE, seed=number, how=how)], modules[number])
        except BaseException as error:
            barrier.abort()
            errors.append(error)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    rates = RATE if net is small_net else lambda step: RATE if step else 0.0
    for number, seed in enumerate((0, 4)):
        expected = by_hand(rates, Project(small_net(seed)), seed=number)
        assert equal_states(state(modules[number]), state(expected))
        assert_nothing_left(modules[number])
