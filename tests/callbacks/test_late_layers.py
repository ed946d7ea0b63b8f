"""Layers that first run after the first batch, or are there only then: from then on they have the drawn flips."""

import pytest
import torch
from by_hand import drawn
from lightning import Callback
from networks import Project, loader, trainer
from operands import Operands, changed
from patterns import SignFunction
from torch import nn

from bnnft.callbacks import BitFlipTraining
from bnnft.nn import BinaryActivation, BinaryLinear

RATE = 0.4
BATCHES = 12

every_how = pytest.mark.parametrize("how", ["auto", "operand", "latent"])
every_layer = pytest.mark.parametrize("layer", [SignFunction, BinaryLinear], ids=["foreign", "own"])


def foreign_net(layer=SignFunction):
    return nn.Sequential(linear(layer, 12, 16), nn.BatchNorm1d(16), BinaryActivation(), nn.Linear(16, 3))


def linear(layer, inputs, outputs):
    return BinaryLinear(inputs, outputs, bias=False) if layer is BinaryLinear else layer(inputs, outputs)


class Still(Project):
    """Weights stay as they are, so that what is computed in each batch shows its flips."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Notes(Callback):
    """Sorts what linear maps compute with by batches: for each, the operand of each shape."""

    def __init__(self, operands):
        self.operands, self.batches = operands, []

    def on_train_batch_end(self, *args):
        self.batches.append(list(self.operands.seen))
        self.operands.seen.clear()


def wrong_bits(folder, module, callbacks, **settings):
    """Train; return for each batch a function that gives the wrong bits of a weight, ``None`` if it was not used."""
    data = loader()
    with Operands() as operands:
        notes = Notes(operands)
        trainer(folder, [*callbacks, notes], **settings).fit(module, data)
    assert len(notes.batches) == BATCHES

    def wrong(name, batch):
        signs = module.get_parameter(name).detach().sign()
        seen = [changed(signs, operand.sign()) for operand in notes.batches[batch] if operand.shape == signs.shape]
        assert all(torch.equal(each, seen[0]) for each in seen)
        return seen[0].tolist() if seen else None

    return wrong


def right_bits(module, name, batch):
    """Return the bits that are to be wrong; there are some."""
    flips = drawn(module, RATE, batch, names=[name])[name].tolist()
    assert flips
    return flips


class TwoNetworks(Still):
    """Each has a step of its own in every batch, and the second is not run before the first's step."""

    automatic_optimization = False

    def __init__(self):
        super().__init__(nn.ModuleList([foreign_net(), nn.Sequential(SignFunction(12, 8), nn.Linear(8, 3))]))

    def training_step(self, batch, batch_idx):
        for net in self.net:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(net(batch[0]), batch[1]))
            optimizer.step()


@every_how
def test_layers_that_run_after_the_first_step_are_found(tmp_path, how):
    module = TwoNetworks()
    wrong = wrong_bits(tmp_path, module, [BitFlipTraining(RATE, how=how)])
    for name in ("net.0.0.weight", "net.1.0.weight"):
        assert wrong(name, 0) == []
        assert all(wrong(name, batch) == right_bits(module, name, batch) for batch in range(1, BATCHES))


class SkipsTheFirst(Still):
    def training_step(self, batch, batch_idx):
        skips = self.trainer.current_epoch == 0 and batch_idx < 2
        return None if skips else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*returned.*None")
@every_how
def test_layers_are_found_in_the_first_batch_that_is_trained_on(tmp_path, how):
    module = SkipsTheFirst(foreign_net())
    wrong = wrong_bits(tmp_path, module, [BitFlipTraining(RATE, how=how)])
    assert [wrong("net.0.weight", batch) for batch in range(3)] == [None, None, []]
    assert all(wrong("net.0.weight", batch) == right_bits(module, "net.0.weight", batch) for batch in range(3, BATCHES))


class TwoTasks(Still):
    """The second task's head runs in every third batch from the fifth on."""

    def __init__(self, layer):
        super().__init__(nn.Sequential(*foreign_net(layer)[:3], linear(layer, 16, 3)))
        self.head = linear(layer, 16, 5)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        number = 6 * self.trainer.current_epoch + batch_idx
        if number >= 4 and number % 3 == 1:
            loss = loss + self.head(self.net[:3](batch[0])).square().mean()
        return loss


@every_layer
@every_how
def test_the_head_of_a_second_task_has_flips_whenever_it_runs(tmp_path, layer, how):
    """In its first batch too, where its layer is known."""
    module = TwoTasks(layer)
    wrong = wrong_bits(tmp_path, module, [BitFlipTraining(RATE, how=how)])
    runs = [batch for batch in range(BATCHES) if wrong("head.weight", batch) is not None]
    assert runs == [4, 7, 10]
    assert wrong("head.weight", 4) == ([] if layer is SignFunction else right_bits(module, "head.weight", 4))
    assert all(wrong("head.weight", batch) == right_bits(module, "head.weight", batch) for batch in (7, 10))
    for batch in range(1, BATCHES):
        assert wrong("net.0.weight", batch) == right_bits(module, "net.0.weight", batch)


class Changes(Callback):
    """Changes the module before its fourth batch."""

    def __init__(self, change):
        self.change = change

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 0 and batch_idx == 2:
            self.change(module)


def add(module, layer):
    module.net.append(linear(layer, 3, 3))


def insert(module, layer):
    """In front: positions of all weights behind it move."""
    module.net.insert(0, linear(layer, 12, 12))


def replace(module, layer):
    module.net[0] = linear(layer, 12, 16)


def assign(module, layer):
    """As ``load_state_dict(..., assign=True)`` does."""
    module.net[0].weight = nn.Parameter(torch.randn(16, 12, generator=torch.Generator().manual_seed(4)))


CHANGES = {add: "net.4.weight", insert: "net.0.weight", replace: "net.0.weight", assign: "net.0.weight"}


@every_layer
@every_how
@pytest.mark.parametrize(("change", "name"), CHANGES.items(), ids=[change.__name__ for change in CHANGES])
@pytest.mark.parametrize("first", [True, False])
def test_layers_that_are_changed_in_between_have_flips(tmp_path, layer, how, change, name, first):
    """From the first batch on where the layer is known, or replaces one in which flips are made where its bits are.

    Weights that stay have flips without a break, whatever they are called now.
    """
    module = Still(foreign_net(layer))
    callbacks = [BitFlipTraining(RATE, how=how), Changes(lambda module: change(module, layer))]
    wrong = wrong_bits(tmp_path, module, callbacks if first else callbacks[::-1])
    at_once = layer is BinaryLinear or (change in (replace, assign) and how != "latent")
    assert wrong(name, 3) == (right_bits(module, name, 3) if at_once else [])
    assert all(wrong(name, batch) == right_bits(module, name, batch) for batch in range(4, BATCHES))
    if change in (add, insert):
        old = "net.0.weight" if change is add else "net.1.weight"
        assert all(wrong(old, batch) == right_bits(module, old, batch) for batch in range(3, BATCHES))


class WarmUp(Still):
    """Computes with floats in the first epoch."""

    def __init__(self):
        super().__init__(foreign_net())

    def forward(self, x):
        if self.trainer.current_epoch == 0:
            return self.net[1:](nn.functional.linear(x, self.net[0].weight))
        return self.net(x)


@every_how
def test_layers_that_are_binarized_after_a_warm_up_are_found(tmp_path, how):
    """And the floats of the warm-up have no flips."""
    module = WarmUp()
    if how == "latent":
        with pytest.raises(RuntimeError, match=r"net\.0\.weight.*used as a float too.*how='operand'"):
            wrong_bits(tmp_path, module, [BitFlipTraining(RATE, how=how)])
        return
    wrong = wrong_bits(tmp_path, module, [BitFlipTraining(RATE, how=how)])
    assert all(wrong("net.0.weight", batch) == right_bits(module, "net.0.weight", batch) for batch in range(7, BATCHES))


class Thaws(Callback):
    def on_train_epoch_start(self, trainer, module):
        module.net[0].requires_grad_(trainer.current_epoch > 0)


@every_how
def test_frozen_layers_have_flips_before_and_after_they_are_thawed(tmp_path, how):
    module = Still(foreign_net())
    wrong = wrong_bits(tmp_path, module, [Thaws(), BitFlipTraining(RATE, how=how)])
    assert all(wrong("net.0.weight", batch) == right_bits(module, "net.0.weight", batch) for batch in range(1, BATCHES))


class Signs(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight + (self.weight.sign() - self.weight).detach())


class Lazy(nn.LazyLinear):
    """Has no weight before its first forward."""

    cls_to_become = Signs
    forward = Signs.forward


@every_how
def test_layers_without_a_weight_before_their_first_forward_are_found(tmp_path, how):
    module = Still(nn.Sequential(Lazy(16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)))
    wrong = wrong_bits(tmp_path, module, [BitFlipTraining(RATE, how=how)])
    assert all(wrong("net.0.weight", batch) == right_bits(module, "net.0.weight", batch) for batch in range(1, BATCHES))
