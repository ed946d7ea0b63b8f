"""What comes, goes or begins to be binarized during a run has flips from the batch after its first one on."""

import pytest
import torch
import torch.nn.functional as F
from binarized import Linear
from binarizers import WIDTH, ste
from torch import nn
from uses import Seen

from bnnft.injection.training import BitFlips


def batches(count, seed=0, size=6):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, WIDTH, generator=generator) for _ in range(count)]


def train(training, data, optimizer=None, loss=None):
    """Return the model's outputs in a plain loop."""
    outputs = []
    for x in data:
        with training.batch():
            output = training.model(x)
            outputs.append(output.detach().clone())
            (output.square().mean() if loss is None else loss(output)).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    return outputs


def names(training):
    return [site.name for site in training.injection.sites]


class Heads(nn.Module):
    """Two heads, one for each task."""

    def __init__(self):
        super().__init__()
        self.heads, self.task = nn.ModuleList([Linear(), Linear()]), 0

    def forward(self, x):
        return self.heads[self.task](x)


def test_a_head_that_runs_later_is_found_when_it_first_runs():
    """In the fifth batch, and has flips from the sixth on."""
    torch.manual_seed(0)
    model = Heads()
    training, outputs, clean = BitFlips(model, 0.3), [], []
    for number, x in enumerate(batches(7)):
        model.task = int(number >= 4)
        outputs += train(training, [x])
        clean.append(model(x).detach())
    assert [torch.allclose(a, b, atol=1e-5) for a, b in zip(outputs, clean, strict=True)] == (
        [True, False, False, False, True, False, False]
    )
    assert names(training) == ["heads.0.weight", "heads.1.weight"]


def grown(model):
    model.append(Linear())


def inserted(model):
    model.insert(0, Linear())


def replaced(model):
    model[0] = Linear()


def replaced_parameter(model):
    model[0].weight = nn.Parameter(torch.randn(WIDTH, WIDTH))


def loaded(model):
    model.load_state_dict({name: torch.randn_like(v) for name, v in model.state_dict().items()}, assign=True)


def unfrozen(model):
    model[0].requires_grad_(True)


@pytest.mark.parametrize("change", [grown, inserted, replaced, replaced_parameter, loaded, unfrozen])
def test_layers_that_change_during_the_run_have_flips(change):
    """Every layer shows flips two batches after the change, in each later batch, and no other place does."""
    torch.manual_seed(0)
    model = nn.Sequential(Linear().requires_grad_(False), nn.Tanh(), Linear())
    training = BitFlips(model, 0.3)
    train(training, batches(3), loss=lambda output: output.sum() + 0 * sum(p.sum() for p in model.parameters()))
    change(model)
    train(training, batches(2))
    layers = [layer for layer in model if isinstance(layer, Linear)]
    for x in batches(2):
        clean, flipped = Seen(), Seen()
        with clean:
            model(x)
        with training.batch(), flipped:
            model(x)
        shown = [operands(seen) for seen in (clean, flipped)]
        assert len(shown[1]) == len(layers)
        assert all(not torch.allclose(a, b) for a, b in zip(*shown, strict=True))


def operands(seen):
    return [call[1] for name, call in zip(seen.names, seen.calls, strict=True) if name == "linear"]


class WarmUp(nn.Module):
    """A float layer in its first batches, binarized later."""

    def __init__(self):
        super().__init__()
        self.w, self.binary = nn.Parameter(torch.randn(WIDTH, WIDTH)), False

    def forward(self, x):
        return F.linear(x, ste(self.w) if self.binary else self.w)


def test_a_warm_up_in_float_is_clean_and_ends_in_flips():
    torch.manual_seed(0)
    model = WarmUp()
    training = BitFlips(model, 0.3)
    first = train(training, batches(4))
    assert all(torch.equal(a, model(x)) for a, x in zip(first, batches(4), strict=True))
    model.binary = True
    second = train(training, batches(4))
    close = [torch.allclose(a, model(x), atol=1e-5) for a, x in zip(second, batches(4), strict=True)]
    assert close == [True, False, False, False]
