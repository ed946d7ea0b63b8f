import sys
from pathlib import Path

import pytest
import torch
from by_hand import by_hand, equal_weights
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import Manual, Project, equal_states, loader, small_net, state, trainer
from patterns import SignFunction
from torch import nn

from bnnft.callbacks import BitFlipTraining


def fit(tmp_path, callbacks, module=None, ckpt_path=None, data=None, **kwargs):
    module = Project() if module is None else module
    trainer(tmp_path, callbacks, **kwargs).fit(module, data or loader(), ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("gradient", ["straight_through", "exact"])
def test_training_is_bit_equal_to_a_plain_loop(tmp_path, gradient):
    module = fit(tmp_path, [BitFlipTraining(0.1, gradient=gradient)])
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
            self.seen[hook].append(module.net[0].weight.detach().clone())

        return look


def test_the_optimizer_and_everything_after_it_see_clean_weights(tmp_path):
    """What the optimizer is given is what it last wrote, although forward and backward saw flipped weights."""
    hooks = ("on_before_backward", "on_before_optimizer_step", "on_train_batch_end", "on_validation_start")
    weights = Weights(*hooks)
    trainer(tmp_path, [BitFlipTraining(0.2), weights]).fit(Project(), loader(), loader())
    flipped, before, after, _ = (weights.seen[hook] for hook in hooks)
    assert torch.equal(before[0], small_net()[0].weight)
    assert all(torch.equal(old, new) for old, new in zip(after[:-1], before[1:], strict=True))
    assert all(not torch.equal(wrong, clean) for wrong, clean in zip(flipped, before, strict=True))
    assert all(torch.equal(wrong.abs(), clean.abs()) for wrong, clean in zip(flipped, before, strict=True))


class Skipping(Project):
    def training_step(self, batch, batch_idx):
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*returned.*None")
def test_a_step_that_returns_none_leaves_clean_weights(tmp_path):
    """No flip survives such a batch: weights seen after it are those seen before it, as without the callback."""
    weights, plain = Weights("on_train_batch_end"), Weights("on_train_batch_end")
    fit(tmp_path, [BitFlipTraining(0.3), weights], Skipping())
    fit(tmp_path, [plain], Skipping())
    signs = [torch.equal(w.abs(), w.sign() * w) for w in weights.seen["on_train_batch_end"]]
    assert all(signs)
    first, second = weights.seen["on_train_batch_end"][:2]
    assert (first.sign() != second.sign()).float().mean() < 0.05  # flips left in would be 0.3


class Leaving(Project):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 2 else None


def test_an_epoch_that_ends_at_a_batch_start_leaves_clean_weights(tmp_path):
    module = fit(tmp_path, [BitFlipTraining(0.3)], Leaving(), max_epochs=1)
    assert equal_weights(module, by_hand(0.3, steps=2))


def test_manual_optimization_is_bit_equal_to_automatic(tmp_path):
    manual, automatic = fit(tmp_path, [BitFlipTraining(0.2)], Manual()), fit(tmp_path, [BitFlipTraining(0.2)])
    assert equal_states(state(manual), state(automatic))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_continues_the_stream_of_flips(tmp_path):
    """Cut after the first epoch; the second part has new objects and other initial weights."""

    def go(folder, epochs, *more):
        callbacks = [BitFlipTraining(0.2), ModelCheckpoint(tmp_path / folder, filename="at")]
        return fit(tmp_path, callbacks, *more, max_epochs=epochs, enable_checkpointing=True)

    go("cut", 1)
    whole, resumed = go("whole", 3), go("resumed", 3, Project(small_net(9)), tmp_path / "cut" / "at.ckpt")
    assert equal_states(state(whole), state(resumed))


def test_a_checkpoint_holds_the_plain_model(tmp_path):
    """Its keys are the model's own, and its weights are those after the optimizer's step."""
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    module = fit(tmp_path, [BitFlipTraining(0.2), checkpoint], enable_checkpointing=True)
    saved = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    assert equal_states(saved, state(module))
    assert saved.keys() == Project().state_dict().keys()


@pytest.mark.parametrize("net", [small_net, lambda: nn.Sequential(SignFunction(12, 16), nn.Linear(16, 3))])
def test_a_checkpoint_loads_where_there_is_no_bnnft(tmp_path, monkeypatch, net):
    """The whole of it, what callbacks keep included: fails if anything in it is an object of ours."""
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    fit(tmp_path, [BitFlipTraining(0.2), checkpoint], Project(net()), enable_checkpointing=True)
    for name in [name for name in sys.modules if name.partition(".")[0] == "bnnft"]:
        monkeypatch.setitem(sys.modules, name, None)
    saved = torch.load(checkpoint.best_model_path, weights_only=False)
    assert len(saved["callbacks"]) == 2


class SavesMidBatch(Callback):
    def on_before_backward(self, trainer, module, loss):
        if trainer.global_step == 3:
            self.flipped = state(module)
            trainer.save_checkpoint(Path(trainer.default_root_dir, "mid.ckpt"))


def test_a_checkpoint_saved_in_the_middle_of_a_batch_is_clean(tmp_path):
    saves, clean = SavesMidBatch(), Weights("on_train_batch_end")
    fit(tmp_path, [BitFlipTraining(0.3), saves, clean])
    saved = torch.load(tmp_path / "mid.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["net.0.weight"], clean.seen["on_train_batch_end"][2])
    assert not torch.equal(saves.flipped["net.0.weight"], saved["net.0.weight"])


def test_two_callbacks_on_different_weights(tmp_path):
    """Each has a state of its own in the checkpoint, and both restore."""
    callbacks = [BitFlipTraining(0.3, weights=["net.0"]), BitFlipTraining(0.1, weights=["net.3"], seed=1)]
    assert len({callback.state_key for callback in callbacks}) == 2
    weights = Weights("on_before_backward", "on_before_optimizer_step")
    fit(tmp_path, [*callbacks, weights], max_epochs=1)
    wrong, clean = weights.seen.values()
    assert all(torch.equal(a.abs(), b.abs()) and not torch.equal(a, b) for a, b in zip(wrong, clean, strict=True))


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


class WithLBFGS(Project):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), max_iter=2)


def test_lbfgs_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="LBFGS evaluates a batch several times"):
        fit(tmp_path, [BitFlipTraining(0.1)], WithLBFGS(), max_steps=2)
