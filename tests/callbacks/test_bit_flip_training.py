import sys

import pytest
import torch
from by_hand import NAMES, by_hand, drawn, equal_weights
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import Manual, Project, equal_states, loader, small_net, state, trainer
from operands import Operands, changed
from patterns import SignFunction
from torch import nn

from bnnft.callbacks import BitFlipTraining

every_how = pytest.mark.parametrize("how", ["auto", "operand", "latent"])


def fit(tmp_path, callbacks, module=None, ckpt_path=None, data=None, **kwargs):
    module = Project() if module is None else module
    trainer(tmp_path, callbacks, **kwargs).fit(module, data or loader(), ckpt_path=ckpt_path)
    return module


@every_how
@pytest.mark.parametrize("gradient", ["straight_through", "exact"])
def test_training_is_bit_equal_to_a_plain_loop(tmp_path, gradient, how):
    module = fit(tmp_path, [BitFlipTraining(0.1, gradient=gradient, how=how)])
    assert equal_states(state(module), state(by_hand(0.1, gradient=gradient)))
    assert not equal_states(state(module), state(by_hand(0.1, seed=1)))


def test_rate_zero_is_training_without_the_callback(tmp_path):
    assert equal_states(state(fit(tmp_path, [BitFlipTraining(0.0)])), state(fit(tmp_path, [])))


class Weights(Callback):
    """Remembers the latent weights at a hook."""

    def __init__(self, *hooks):
        self.seen = {hook: [] for hook in hooks}
        for hook in hooks:
            setattr(self, hook, self._look(hook))

    def _look(self, hook):
        def look(trainer, module, *args, **kwargs):
            self.seen[hook].append([module.get_parameter(name).detach().clone() for name in NAMES])

        return look


def flat(steps):
    return torch.cat([weight.reshape(-1) for weights in steps for weight in weights])


@every_how
def test_the_layers_compute_with_the_drawn_flips_and_the_optimizer_sees_clean_weights(tmp_path, how):
    """What the optimizer is given is what it last wrote, and the operands of each step are its signs, but for the
    drawn bits."""
    weights, module, data = Weights("on_before_optimizer_step", "on_train_batch_end"), Project(), loader()
    with Operands() as operands:
        fit(tmp_path, [BitFlipTraining(0.2, how=how), weights], module, data=data)
    before, after = weights.seen.values()
    assert torch.equal(before[0][0], small_net()[0].weight)
    assert torch.equal(flat(after[:-1]), flat(before[1:]))
    steps = operands.steps(3)
    assert len(steps) == len(before) == 12
    for step, (seen, latents) in enumerate(zip(steps, before, strict=True)):
        for operand, latent, indices in zip(seen, latents, drawn(module, 0.2, step).values(), strict=True):
            assert len(indices) > 0
            assert torch.equal(changed(latent.sign(), operand), indices)


class Leaving(Project):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 2 else None


@every_how
def test_an_epoch_that_ends_at_a_batch_start_leaves_clean_weights(tmp_path, how):
    module = fit(tmp_path, [BitFlipTraining(0.3, how=how)], Leaving(), max_epochs=1)
    assert equal_weights(module, by_hand(0.3, steps=2))


def test_manual_optimization_is_bit_equal_to_a_plain_loop(tmp_path):
    assert equal_states(state(fit(tmp_path, [BitFlipTraining(0.2)], Manual())), state(by_hand(0.2)))


@pytest.mark.parametrize("net", [small_net, lambda: nn.Sequential(SignFunction(12, 16), nn.Linear(16, 3))])
def test_a_checkpoint_loads_where_there_is_no_bnnft(tmp_path, monkeypatch, net):
    """The whole of it, what callbacks keep included: fails if anything in it is an object of ours."""
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    fit(tmp_path, [BitFlipTraining(0.2), checkpoint], Project(net()), enable_checkpointing=True)
    for name in [name for name in sys.modules if name.partition(".")[0] == "bnnft"]:
        monkeypatch.setitem(sys.modules, name, None)
    saved = torch.load(checkpoint.best_model_path, weights_only=False)
    assert len(saved["callbacks"]) == 2


def test_two_callbacks_on_different_weights(tmp_path):
    """Each has a state of its own in the checkpoint, and each flips its own weight at its own rate."""
    callbacks = [BitFlipTraining(0.3, weights=["net.0"]), BitFlipTraining(0.1, weights=["net.3"], seed=1)]
    assert len({callback.state_key for callback in callbacks}) == 2
    weights, module, data = Weights("on_before_optimizer_step"), Project(), loader()
    with Operands() as operands:
        fit(tmp_path, [*callbacks, weights], module, data=data, max_epochs=1)
    (latents,) = weights.seen.values()
    for step, seen in enumerate(operands.steps(3)):
        first, second = drawn(module, 0.3, step)["net.0.weight"], drawn(module, 0.1, step, seed=1)["net.3.weight"]
        wrong = [changed(latent.sign(), operand).tolist() for latent, operand in zip(latents[step], seen, strict=True)]
        assert wrong == [first.tolist(), second.tolist(), []]
        assert wrong[0]
        assert wrong[1]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"error_model": 1.2}, ValueError, r"rate must be a fraction in \[0, 1\], got 1.2"),
        ({"error_model": float("nan")}, ValueError, "got nan"),
        ({"error_model": "0.1"}, TypeError, "got '0.1'"),
        ({"error_model": 0.1, "gradient": "true"}, ValueError, "gradient must be one of straight_through, exact"),
        ({"error_model": 0.1, "seed": -1}, ValueError, "seed must be an integer >= 0, got -1"),
    ],
)
def test_bad_arguments_raise_at_construction(arguments, error, says):
    with pytest.raises(error, match=says):
        BitFlipTraining(**arguments)


def test_a_model_without_binarized_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Project has no binarized weights"):
        fit(tmp_path, [BitFlipTraining(0.1)], Project(nn.Linear(12, 3)))


def test_an_unknown_pattern_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the pattern 'fc9\*' matches no parameter"):
        fit(tmp_path, [BitFlipTraining(0.1, weights=["fc9*"])])
