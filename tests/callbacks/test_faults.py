"""Whatever breaks, and whenever: weights are what the optimizer last wrote, and nothing that was written is lost."""

import copy
import os
import resource
import signal
import warnings

import pytest
import torch
from by_hand import by_hand, drawn, equal_weights
from commands import run_script
from leftovers import assert_nothing_left
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from networks import Project, equal_states, loader, state, trainer
from operands import Operands, changed

from bnnft.ber import Independent
from bnnft.callbacks import AccuracyOverBER, BitFlipTraining, ToleranceMetrics


def after(steps):
    """The module after so many steps in a plain loop."""
    return by_hand(0.3, steps=steps)


@pytest.mark.parametrize("layer", ["BinaryLinear", "SignFunction", "Centred"])
def test_a_run_killed_in_the_middle_of_a_batch_goes_on_bit_equal(tmp_path, layer):
    """Kill -9 in the third epoch, resumed from the last checkpoint, with shuffled data.

    Fails if the number of draws, or for layers of others where the flips go, is not in the checkpoint. Once it goes on
    in a new process of Python, where sets of strings have another order.
    """

    def go(name, rate, *more, anew=False):
        (tmp_path / name).mkdir(exist_ok=True)
        return run_script("killed.py", layer, tmp_path / name, rate, *more, anew=anew).returncode

    assert go("whole", "0.2") == go("without", "0") == 0
    assert go("cut", "0.2", "15") == -signal.SIGKILL
    assert not (tmp_path / "cut" / "weights.pt").exists()
    assert go("cut", "0.2", anew=layer == "SignFunction") == 0
    names = ("whole", "cut", "without")
    whole, resumed, without = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in names)
    assert equal_states(whole, resumed)
    assert not equal_states(whole, without)


def is_flipped(module):
    """Return whether the first layer would compute with other bits than those of its weight."""
    return not torch.equal(module.net[0].bits(), torch.copysign(torch.ones(()), module.net[0].weight))


class Stumble(Callback):
    """Raises at a call of a hook."""

    def __init__(self, hook, error, at=3):
        self.calls, self.error, self.at = 0, error, at
        setattr(self, hook, self._raise)

    def _raise(self, trainer, module, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at:
            self.flipped = is_flipped(module)
            raise self.error


HOOKS = ["on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step"]


@pytest.mark.parametrize("hook", [*HOOKS, "on_before_zero_grad", "on_train_batch_end"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("error", [ValueError("stumbled"), KeyboardInterrupt()])
@pytest.mark.parametrize("how", ["auto", "latent"])
def test_an_error_in_any_hook_leaves_clean_weights(tmp_path, hook, first, error, how):
    stumble, training, module = Stumble(hook, error), BitFlipTraining(0.3, how=how), Project()
    with pytest.raises((ValueError, SystemExit)) as caught:
        trainer(tmp_path, [stumble, training] if first else [training, stumble]).fit(module, loader())
    assert error in (caught.value, caught.value.__context__)  # Lightning makes an exit of an interrupt
    if how == "auto":
        assert stumble.flipped == {"on_train_batch_start": not first, "on_train_batch_end": first}.get(hook, True)
    steps = 3 if hook == "on_train_batch_end" else 2
    assert equal_weights(module, after(steps))
    assert_nothing_left(module)


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


every_how = pytest.mark.parametrize("how", ["auto", "operand", "latent"])


@every_how
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_in_forward_or_backward_leaves_clean_weights(tmp_path, where, how):
    module = Breaking(where)
    with pytest.raises((RuntimeError, IndexError), match=r"forward broke|index 100 is out of bounds"):
        trainer(tmp_path, [BitFlipTraining(0.3, how=how)]).fit(module, loader())
    assert equal_weights(module, after(2))
    assert_nothing_left(module)


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


@every_how
def test_an_error_in_the_optimizer_leaves_clean_weights(tmp_path, how):
    module = BreaksInStep()
    with pytest.raises(OSError, match="the optimizer broke"):
        trainer(tmp_path, [BitFlipTraining(0.3, how=how)]).fit(module, loader())
    assert equal_weights(module, after(2))
    assert_nothing_left(module)


class BreaksInValidation(Project):
    """Raises at a forward of the measuring, counted among those that run with flips, or among the others."""

    def __init__(self, flipped, at, error):
        super().__init__()
        self.flipped, self.error = flipped, error
        forwards = []  # which no measuring puts back

        def is_due():
            forwards.append(len(forwards))
            return len(forwards) == at

        self.is_due = is_due

    def forward(self, x):
        if not self.training and not torch.is_grad_enabled() and is_flipped(self) == self.flipped and self.is_due():
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize(("flipped", "at"), [(False, 1), (False, 4), (True, 1), (True, 2), (True, 6)])
@pytest.mark.parametrize("error", [ValueError("broke"), KeyboardInterrupt()])
def test_an_error_in_validation_leaves_clean_weights(tmp_path, flipped, at, error):
    module = BreaksInValidation(flipped, at, error)
    curve = AccuracyOverBER([0, 0.1], error_model=Independent(0.4), validation_maps=3)
    run = trainer(tmp_path, [BitFlipTraining(0.3), curve], max_epochs=1, num_sanity_val_steps=0)
    caught = None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            run.fit(module, loader(), loader())
        except (ValueError, SystemExit) as raised:
            caught = raised
    if any("leaves out val/acc_faulty from now on: broke" in str(each.message) for each in said):
        assert caught is None, "an error of the measuring ends no training"
        assert isinstance(error, ValueError)
    else:
        assert caught is not None
        assert error in (caught, caught.__context__)
    assert equal_weights(module, after(6))
    assert_nothing_left(module)


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


@every_how
@pytest.mark.parametrize("odd", [torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0])
def test_odd_floats_have_flips_and_stay_what_they_are_bit_for_bit(tmp_path, odd, how):
    """They have a sign bit, which is the stored bit. A learning rate of 0 leaves infinities what they are."""
    module, data = Project(lr=0.0), loader()
    with torch.no_grad():
        module.net[3].weight[::2, ::3] = odd
    before = module.net[3].weight.detach().clone()

    class OnlyFlips(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for weight in pl_module.parameters():
                weight.grad = None  # nothing but the flips is to write to the weights

    with Operands() as operands:
        trainer(tmp_path, [BitFlipTraining(0.5, how=how), OnlyFlips()]).fit(module, data)
    assert torch.equal(module.net[3].weight.view(torch.int32), before.view(torch.int32))
    for step, (_, bits, _) in enumerate(operands.steps(3)):
        wrong = changed(before.signbit(), bits.signbit())
        assert torch.equal(wrong, drawn(module, 0.5, step)["net.3.weight"])


class Writes(Project):
    """Writes to a binarized weight in the middle of a batch."""

    def __init__(self, write):
        super().__init__()
        self.write = write

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2:
            with torch.no_grad():
                self.write(self.net[3].weight)
        return loss


class Looks(Callback):
    """Keeps what the optimizer is given at last."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen = pl_module.net[3].weight.detach().clone()


@every_how
def test_a_write_in_between_that_keeps_signs_stays(tmp_path, how):
    """A clamp, as some layers do in their forward: magnitudes are as written, signs as before."""
    module, looks = Writes(lambda weight: weight.clamp_(-0.01, 0.01)), Looks()
    callbacks = [BitFlipTraining(0.3, how=how), looks]
    trainer(tmp_path, callbacks, limit_train_batches=3, max_epochs=1).fit(module, loader())
    assert torch.equal(looks.seen, after(2).net[3].weight.clamp(-0.01, 0.01))


def replaced(weight):
    weight.data = -weight.data


WRITES = {"in place": lambda weight: weight.neg_(), "replaced": replaced}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("how", ["auto", "operand"])
def test_a_write_in_between_that_changes_signs_stays_where_bits_are_flipped_as_they_are_made(tmp_path, write, how):
    module, looks = Writes(write), Looks()
    callbacks = [BitFlipTraining(0.3, how=how), looks]
    trainer(tmp_path, callbacks, limit_train_batches=3, max_epochs=1).fit(module, loader())
    assert torch.equal(looks.seen, -after(2).net[3].weight)


@pytest.mark.parametrize(("write", "said"), [(WRITES["in place"], "overwritten"), (replaced, "replaced")])
def test_a_write_in_between_that_changes_signs_is_an_error_in_flipped_latents(tmp_path, write, said):
    module = Writes(write)
    with pytest.raises(RuntimeError, match=rf"net\.3\.weight.*{said}"):
        trainer(tmp_path, [BitFlipTraining(0.3, how="latent")]).fit(module, loader())
    assert_nothing_left(module)


MEASURING = ["on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end", "on_validation_start"]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("hook", MEASURING)
def test_an_error_of_another_callback_in_validation_leaves_nothing_behind(tmp_path, hook, first):
    """No hook, no mode: the next run of the same module is that of a new one with its weights."""
    module = Project()
    measuring = [BitFlipTraining(0.3), ToleranceMetrics(), AccuracyOverBER([0], error_model=Independent(0.4))]
    stumble = Stumble(hook, ValueError("failed"), at=2)
    callbacks = [stumble, *measuring] if first else [*measuring, stumble]
    with pytest.raises(ValueError, match="failed"):
        trainer(tmp_path, callbacks, num_sanity_val_steps=0).fit(module, loader(), loader())
    assert equal_weights(module, after(6 if "batch" in hook else 12))
    assert_nothing_left(module)
    again = copy.deepcopy(module.train())
    trainer(tmp_path, [BitFlipTraining(0.3)]).fit(module, loader())
    assert equal_states(state(module), state(by_hand(0.3, again)))
