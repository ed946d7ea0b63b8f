"""Whatever breaks, and whenever: weights are what the optimizer last wrote, and nothing that was written is lost."""

import os
import resource
import signal

import pytest
import torch
from by_hand import by_hand, equal_weights
from commands import run_script
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from networks import Project, equal_states, loader, trainer

from bnnft.ber import Independent
from bnnft.callbacks import AccuracyOverBER, BitFlipTraining, ToleranceMetrics


def after(steps):
    """The module after so many steps in a plain loop."""
    return by_hand(0.3, steps=steps)


@pytest.mark.parametrize("layer", ["BinaryLinear", "SignFunction", "Centred"])
def test_a_run_killed_in_the_middle_of_a_batch_goes_on_bit_equal(tmp_path, layer):
    """Kill -9 in the third epoch, resumed from the last checkpoint, with shuffled data.

    Fails if the number of draws, or for layers of others where the flips go, is not in the checkpoint.
    """

    def go(folder, *more):
        folder.mkdir(exist_ok=True)
        return run_script("killed.py", layer, folder, *more).returncode

    assert go(tmp_path / "whole") == 0
    assert go(tmp_path / "cut", "15") == -signal.SIGKILL
    assert not (tmp_path / "cut" / "weights.pt").exists()
    assert go(tmp_path / "cut") == 0
    whole, resumed = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("whole", "cut"))
    assert equal_states(whole, resumed)


class Stumble(Callback):
    """Raises at a call of a hook."""

    def __init__(self, hook, error, at=3):
        self.calls, self.error, self.at = 0, error, at
        setattr(self, hook, self._raise)

    def _raise(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at:
            raise self.error


HOOKS = ["on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step"]


@pytest.mark.parametrize("hook", [*HOOKS, "on_before_zero_grad", "on_train_batch_end"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("error", [ValueError("stumbled"), KeyboardInterrupt()])
def test_an_error_in_any_hook_leaves_clean_weights(tmp_path, hook, first, error):
    callbacks = [Stumble(hook, error), BitFlipTraining(0.3)]
    module = Project()
    with pytest.raises((ValueError, SystemExit, KeyboardInterrupt)):
        trainer(tmp_path, callbacks if first else callbacks[::-1]).fit(module, loader())
    steps = 3 if hook == "on_train_batch_end" else 2
    assert equal_weights(module, after(steps))


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
        trainer(tmp_path, [BitFlipTraining(0.3)]).fit(module, loader())
    assert equal_weights(module, after(2))


class BreaksInStep(Project):
    """Its optimizer raises at the third step, before it writes anything."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.register_step_pre_hook(lambda *args: None)
        step, self.steps = optimizer.step, 0

        def breaking(closure=None):
            self.steps += 1
            if self.steps == 3:
                closure()
                raise OSError("the optimizer broke")
            return step(closure)

        optimizer.step = breaking
        return optimizer


def test_an_error_in_the_optimizer_leaves_clean_weights(tmp_path):
    module = BreaksInStep()
    with pytest.raises(OSError, match="the optimizer broke"):
        trainer(tmp_path, [BitFlipTraining(0.3)]).fit(module, loader())
    assert equal_weights(module, after(2))


class BreaksInValidation(Project):
    """Raises at a forward in the middle of the measuring: some run under flips."""

    def __init__(self, at, error):
        super().__init__()
        self.at, self.error, self.forwards = at, error, 0

    def forward(self, x):
        if not self.training and not torch.is_grad_enabled():
            self.forwards += 1
            if self.forwards == self.at:
                raise self.error
        return super().forward(x)


@pytest.mark.parametrize("at", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("error", [ValueError("broke"), KeyboardInterrupt()])
def test_an_error_in_validation_leaves_clean_weights(tmp_path, at, error):
    module = BreaksInValidation(at, error)
    curve = AccuracyOverBER([0, 0.1], error_model=Independent(0.4), validation_maps=3)
    run = trainer(tmp_path, [BitFlipTraining(0.3), curve], max_epochs=1, num_sanity_val_steps=0)
    with pytest.raises((ValueError, SystemExit, KeyboardInterrupt)):
        run.fit(module, loader(), loader())
    assert equal_weights(module, after(6))


class Terminated(Project):
    """Gets the signal by which clusters announce their end, in the middle of a batch."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)


def test_a_terminated_run_leaves_clean_weights(tmp_path):
    module = Terminated()
    with pytest.raises(SIGTERMException):
        trainer(tmp_path, [BitFlipTraining(0.3)]).fit(module, loader())
    assert equal_weights(module, after(4))


class FillsDisk(Callback):
    """From the second epoch on no file may grow beyond 1 kB: writes fail as on a full disk."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))


def test_a_full_disk_loses_neither_weights_nor_the_checkpoint_before(tmp_path):
    module, checkpoint = Project(), ModelCheckpoint(tmp_path)
    try:
        with pytest.raises((OSError, RuntimeError)):
            trainer(tmp_path, [FillsDisk(), BitFlipTraining(0.3), checkpoint], enable_checkpointing=True).fit(
                module, loader()
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert equal_weights(module, after(12))
    kept = torch.load(tmp_path / "epoch=0-step=6.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(kept["net.0.weight"], after(6).net[0].weight)


@pytest.mark.parametrize("odd", [torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0])
def test_odd_floats_are_turned_and_come_back_bit_for_bit(tmp_path, odd):
    """They have a sign bit, which is the stored bit. A learning rate of 0 leaves infinities what they are."""
    module = Project(lr=0.0)
    with torch.no_grad():
        module.net[3].weight[::2, ::3] = odd
    before = module.net[3].weight.detach().clone()
    seen = []

    class Sees(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            seen.append(pl_module.net[3].weight.detach().signbit())

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for weight in pl_module.parameters():
                weight.grad = None  # nothing but the flips is to write to the weights

    trainer(tmp_path, [BitFlipTraining(0.5), Sees()]).fit(module, loader())
    assert torch.equal(module.net[3].weight.view(torch.int32), before.view(torch.int32))
    assert all(0.3 < (signs != before.signbit()).float().mean() < 0.7 for signs in seen)


class Writes(Project):
    """Writes to a binarized weight while its bits are turned."""

    def __init__(self, write):
        super().__init__()
        self.write = write

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2:
            with torch.no_grad():
                self.write(self.net[3].weight)
        return loss


def test_a_write_in_between_that_keeps_signs_stays(tmp_path):
    """A clamp, as some layers do in their forward: magnitudes are as written, signs as before."""
    module = Writes(lambda weight: weight.clamp_(-0.01, 0.01))

    class Looks(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.seen = pl_module.net[3].weight.detach().clone()

    looks = Looks()
    trainer(tmp_path, [BitFlipTraining(0.3), looks], limit_train_batches=3, max_epochs=1).fit(module, loader())
    assert torch.equal(looks.seen, after(2).net[3].weight.clamp(-0.01, 0.01))


@pytest.mark.parametrize("replaced", [True, False])
def test_a_write_in_between_that_turns_signs_is_an_error(tmp_path, replaced):
    def write(weight):
        if replaced:
            weight.data = -weight.data
        else:
            weight.neg_()

    module = Writes(write)
    said = "its memory was replaced" if replaced else "flipped bits were overwritten"
    with pytest.raises(RuntimeError, match=rf"net\.3\.weight: .*{said}.*Update weights outside"):
        trainer(tmp_path, [BitFlipTraining(0.3)]).fit(module, loader())


MEASURING = ["on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end", "on_validation_start"]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("hook", MEASURING)
def test_an_error_of_another_callback_in_validation_leaves_nothing_behind(tmp_path, hook, first):
    """No hook, no mode: the next run of the same module is that of a new one."""
    module = Project()
    measuring = [BitFlipTraining(0.3), ToleranceMetrics(), AccuracyOverBER([0], error_model=Independent(0.4))]
    stumble = Stumble(hook, ValueError("failed"), at=2)
    callbacks = [stumble, *measuring] if first else [*measuring, stumble]
    with pytest.raises(ValueError, match="failed"):
        trainer(tmp_path, callbacks, num_sanity_val_steps=0).fit(module, loader(), loader())
    assert equal_weights(module, after(6 if "batch" in hook else 12))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert not torch.overrides._get_current_function_mode_stack()
