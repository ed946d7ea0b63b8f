"""Float parameters that hold two values may be bits and may be how a layer starts: what follows decides."""

import pytest
import torch
import torch.nn.functional as F
from binarizers import WIDTH
from torch import nn

from bnnft.injection.training import BitFlips


class Plain(nn.Module):
    """A product with a parameter as it is, beside nothing."""

    def __init__(self, values):
        super().__init__()
        self.w = nn.Parameter(values)

    def forward(self, x):
        return F.linear(x, self.w)


def signs():
    torch.manual_seed(0)
    return torch.randn(WIDTH, WIDTH).sign()


def run(model, batches, update, rate=0.3):
    """Return in which batches the model computed with other values than its parameter's, and all that was said."""
    said = []
    training, flipped = BitFlips(model, rate, say=said.append), []
    for number in range(batches):
        x = torch.randn(6, WIDTH)
        with training.batch():
            flipped.append(not torch.equal(model(x), F.linear(x, model.w)))
        update(model.w.data, number)
    return flipped, said, [site.name for site in training.injection.sites]


def bop(weight, number):
    """Flips some signs, as an optimizer of binary weights does."""
    weight.view(-1)[number % 7 :: 7] *= -1


def gradient(weight, number):
    weight.add_(torch.randn(WIDTH, WIDTH) * 0.01)


def nothing(weight, number):
    pass


def test_bits_are_flipped_as_soon_as_an_update_has_left_two_values():
    flipped, said, sites = run(Plain(signs()), 4, bop)
    assert flipped == [False, True, True, True]
    assert sites == ["w"]
    assert sum("w holds two values" in text for text in said) == 1


def test_a_float_layer_that_starts_with_two_values_has_never_flips():
    flipped, said, sites = run((nn.ModuleDict({}) and None) or Plain(0.1 * signs()), 6, gradient)
    assert not any(flipped)
    assert sites == []
    assert sum("w holds two values" in text for text in said) == 1


@pytest.mark.parametrize(("values", "first"), [(signs(), 2), (0.1 * signs(), 11)], ids=["-1 and +1", "-c and +c"])
def test_what_nobody_updates_counts_as_bits_after_a_while(values, first):
    """One batch after the first that is left unchanged, or ten where the two values are not -1 and +1."""
    flipped, _, sites = run(Plain(values), 13, nothing)
    assert flipped == [number >= first for number in range(13)]
    assert sites == ["w"]


def test_what_can_not_be_trained_needs_not_wait():
    model = Plain(0.1 * signs())
    model.w.requires_grad_(False)
    assert run(model, 3, nothing)[0] == [False, True, True]


def test_bits_whose_scale_changes_are_floats():
    """Weights that are updated as floats of one magnitude by chance are not flipped."""
    flipped, _, sites = run(Plain(signs()), 4, lambda weight, number: weight.mul_(1.01))
    assert not any(flipped)
    assert sites == []


def test_what_turned_out_to_be_a_float_is_known_as_one():
    model, said = Plain(0.1 * signs()), []
    training = BitFlips(model, 0.2, say=said.append)
    for number in range(3):
        with training.batch():
            model(torch.randn(6, WIDTH))
        gradient(model.w.data, number)
    assert "w" in training.injection.finder.findings.floats
