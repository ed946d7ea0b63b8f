from pathlib import Path

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import Project, equal_states, loader, small_net, state, trainer
from torch import nn

from bnnft.ber import Independent, Key
from bnnft.callbacks import BitFlipTraining
from bnnft.injection import draw_flips
from bnnft.sites import find_sites


def by_hand(rate, gradient="straight_through", epochs=2, seed=0):
    """The same training in a plain loop, with copies of the weights instead of turned bits."""
    module = Project()
    sites, optimizer, step = find_sites(module), module.configure_optimizers(), 0
    for _ in range(epochs):
        for x, y in loader():
            flips = draw_flips(sites, Independent(rate), Key(seed, step, purpose="training"))
            clean = [site.weight.detach().clone() for site in sites]
            for site in sites:
                site.weight.data.view(-1)[flips[site.name]] *= -1
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            for site, weight in zip(sites, clean, strict=True):
                if gradient == "exact":
                    site.weight.grad.view(-1)[flips[site.name]] *= -1
                site.weight.data.copy_(weight)
            optimizer.step()
            step += 1
    return module


def fit(tmp_path, callbacks, module=None, ckpt_path=None, data=None, **kwargs):
    module = Project() if module is None else module
    trainer(tmp_path, callbacks, **kwargs).fit(module, data or loader(), ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("gradient", ["straight_through", "exact"])
def test_training_is_bit_equal_to_a_plain_loop(tmp_path, gradient):
    module = fit(tmp_path, [BitFlipTraining(0.1, gradient=gradient)])
    assert equal_states(state(module), state(by_hand(0.1, gradient)))
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


class Stumble(Callback):
    """Raises at the third call of a hook."""

    def __init__(self, hook, error):
        self.calls, self.error = 0, error
        setattr(self, hook, self._raise)

    def _raise(self, *args, **kwargs):
        self.calls += 1
        if self.calls == 3:
            raise self.error


HOOKS = ["on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step"]


@pytest.mark.parametrize("hook", [*HOOKS, "on_before_zero_grad", "on_train_batch_end"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("error", [ValueError("stumbled"), KeyboardInterrupt()])
def test_an_error_in_any_hook_leaves_clean_weights(tmp_path, hook, first, error):
    callbacks = [Stumble(hook, error), BitFlipTraining(0.3)]
    weights, module = Weights("on_train_batch_end", "on_before_optimizer_step"), Project()
    with pytest.raises((ValueError, SystemExit, KeyboardInterrupt)):
        fit(tmp_path, [weights, *(callbacks if first else callbacks[::-1])], module)
    steps = 3 if hook == "on_train_batch_end" else 2
    assert equal_states_of_weights(module, reference_after(steps))


def reference_after(steps):
    """Latent weights after so many steps, from a run that ends in peace."""
    module = Project()
    sites, optimizer = find_sites(module), module.configure_optimizers()
    for step, (x, y) in zip(range(steps), loader(), strict=False):
        flips = draw_flips(sites, Independent(0.3), Key(0, step, purpose="training"))
        for site in sites:
            site.weight.data.view(-1)[flips[site.name]] *= -1
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        for site in sites:
            site.weight.data.view(-1)[flips[site.name]] *= -1
        optimizer.step()
    return module


def equal_states_of_weights(a, b):
    return all(torch.equal(x.weight, y.weight) for x, y in zip(find_sites(a), find_sites(b), strict=True))


class Breaking(Project):
    def __init__(self, where):
        super().__init__()
        self.where, self.steps = where, 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        if self.steps == 3 and self.where == "forward":
            raise RuntimeError("forward broke")
        loss = super().training_step(batch, batch_idx)
        if self.steps == 3 and self.where == "backward":
            loss.register_hook(lambda gradient: gradient.new_zeros(99)[100])
        return loss


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_in_forward_or_backward_leaves_clean_weights(tmp_path, where):
    module = Breaking(where)
    with pytest.raises((RuntimeError, IndexError)):
        fit(tmp_path, [BitFlipTraining(0.3)], module)
    assert equal_states_of_weights(module, reference_after(2))


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
    assert equal_states_of_weights(module, reference_after(2))


class Manual(Project):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


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
