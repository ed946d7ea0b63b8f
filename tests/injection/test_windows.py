"""In every way to train, each forward sees the flips, and each update sees clean weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from latents import (
    Recording,
    Saving,
    Stored,
    batches,
    binary_layers,
    bits,
    by_multiplication,
    copied_state,
    differing,
    draw,
    equal_states,
    multiplied,
    network,
    same_flips,
    sites,
)
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from bnnft.injection.latent import LatentFlips


def plain(model, forward, x, y):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    F.cross_entropy(forward(x), y).backward()
    optimizer.step()


def two_optimizers(model, forward, x, y):
    for part in (model[:3], model[3:]):
        optimizer = torch.optim.Adam(part.parameters(), 0.1)
        model.zero_grad()
        F.cross_entropy(forward(x), y).backward()
        optimizer.step()


def by_hand(model, forward, x, y):
    model.zero_grad()
    F.cross_entropy(forward(x), y).backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 0.1 * weight.grad


def by_hand_in_numpy(model, forward, x, y):
    model.zero_grad()
    F.cross_entropy(forward(x), y).backward()
    for weight in model.parameters():
        weight.detach().numpy()[...] -= 0.1 * weight.grad.numpy()


def by_autograd_grad(model, forward, x, y):
    weights = list(model.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(forward(x), y), weights)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.data = weight.data - 0.1 * gradient


def double_backward(model, forward, x, y):
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(forward(x), y)
    weights = [x, *model.parameters()]
    gradients = torch.autograd.grad(loss, weights, create_graph=True)
    model.zero_grad()
    (loss + sum(gradient.pow(2).sum() for gradient in gradients)).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


def two_losses(model, forward, x, y):
    model.zero_grad()
    output = forward(x)
    F.cross_entropy(output, y).backward(retain_graph=True)
    output.tanh().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


def sharpness_aware(model, forward, x, y):
    """A step up, a second gradient there, and back."""
    model.zero_grad()
    F.cross_entropy(forward(x), y).backward()
    with torch.no_grad():
        steps = [0.05 * weight.grad for weight in model.parameters()]
        for weight, step in zip(model.parameters(), steps, strict=True):
            weight += step
    model.zero_grad()
    F.cross_entropy(forward(x), y).backward()
    with torch.no_grad():
        for weight, step in zip(model.parameters(), steps, strict=True):
            weight -= step
    torch.optim.SGD(model.parameters(), 0.1).step()


def lbfgs(model, forward, x, y):
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=4)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)


def looks_first(model, forward, x, y):
    """Forwards without gradients beside the one that trains, before and after it."""
    with torch.no_grad():
        forward(x)
        for weight in model.parameters():
            weight *= 0.9
    output = forward(x)
    with torch.no_grad():
        forward(x + 1)
    model.zero_grad()
    F.cross_entropy(output, y).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


def updated_in_backward(model, forward, x, y):
    def step(weight):
        with torch.no_grad():
            weight -= 0.1 * weight.grad
        weight.grad = None

    hooks = [weight.register_post_accumulate_grad_hook(step) for weight in model.parameters()]
    F.cross_entropy(forward(x), y).backward()
    for hook in hooks:
        hook.remove()


def a_frozen_layer(model, forward, x, y):
    """Frozen and thawed within the batch, as Lightning does it for several optimizers."""
    weight = binary_layers(model)[1].weight
    weight.requires_grad_(False)
    plain(model, forward, x, y)
    weight.requires_grad_(True)
    plain(model, forward, x, y)


def from_an_inner_value(model, forward, x, y):
    """The loss is made of what a layer inside has returned, not of the output."""
    kept = []
    hook = model[5].register_forward_hook(lambda module, args, output: kept.append(output))
    forward(x)
    hook.remove()
    model.zero_grad()
    kept[0].pow(2).mean().backward()
    torch.optim.SGD(model.parameters(), 0.01).step()


def an_error_in_between(model, forward, x, y):
    """A backward that fails is caught, and the batch is tried again."""
    output = forward(x)
    output.register_hook(lambda gradient: gradient.new_zeros(1)[2])
    with pytest.raises(IndexError):
        output.sum().backward()
    with pytest.raises(RuntimeError):
        forward(x[:, :5])
    model.zero_grad()
    plain(model, forward, x, y)


MODES = [plain, two_optimizers, by_hand, by_hand_in_numpy, by_autograd_grad, double_backward, two_losses]
MODES += [sharpness_aware, lbfgs, looks_first, updated_in_backward, a_frozen_layer, from_an_inner_value]
MODES += [an_error_in_between]
AGAIN = {two_losses, double_backward}  # go through one forward twice, which autograd refuses where it saved the latent


def trained(mode, kinds, ours, exact=False, check=False):
    """The model after three batches with flips of their own."""
    model = network(*kinds)
    for step, (x, y) in enumerate(batches(3)):
        flips = draw(model, step)
        if ours:
            with LatentFlips(model, sites(model), flips, exact=exact, check=check):
                mode(model, model, x, y)
                assert all(not len(indices) for indices in differing(model, bits(model)).values())
        else:
            mode(model, by_multiplication(model, flips, exact), x, y)
    return model


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kinds", [(Recording,), (Saving,), (Stored,), (Saving, Recording, Stored)], ids=str)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
def test_a_training_step_is_that_with_signs_multiplied(mode, kinds, exact):
    if mode in AGAIN and kinds != (Recording,):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            trained(mode, kinds, ours=True, exact=exact)
        return
    ours, reference = trained(mode, kinds, True, exact, check=exact), trained(mode, kinds, False, exact)
    assert equal_states(copied_state(ours), copied_state(reference))
    for layer, expected in zip(binary_layers(ours), binary_layers(reference), strict=True):
        if isinstance(layer, Recording):
            assert layer.seen
            assert all(torch.equal(a, b) for a, b in zip(layer.seen, expected.seen, strict=True))


class Checkpointed(nn.Module):
    """Two segments that are computed again in backward, and a layer of the first is used once more in the second.

    Args:
        calls: how a layer is run: as a module, whose hooks run, or by its forward, where none does.
        reentrant: the kind of checkpointing, or None for none.
    """

    def __init__(self, kind, calls, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = kind(12, 12), kind(12, 12), kind(12, 3)
        self.calls, self.reentrant = calls, reentrant

    def run(self, layer, x):
        return layer(x) if self.calls == "modules" else layer.forward(x)

    def front(self, x):
        return torch.tanh(self.run(self.second, torch.tanh(self.run(self.first, x))))

    def back(self, x):
        return self.run(self.third, torch.tanh(self.run(self.first, x)))

    def forward(self, x):
        for segment in (self.front, self.back):
            x = segment(x) if self.reentrant is None else checkpoint(segment, x, use_reentrant=self.reentrant)
        return x


def gradients(model):
    return [weight.grad for weight in model.parameters()]


@pytest.mark.parametrize("losses", [1, 2])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("calls", ["modules", "forward"])
@pytest.mark.parametrize("kind", [Recording, Saving, Stored])
def test_gradients_with_checkpointing_are_those_without_it(kind, calls, reentrant, losses):
    x = batches(1)[0][0].requires_grad_()
    plain = Checkpointed(kind, calls, None)
    flips = draw(plain)
    output = functional_call(plain, multiplied(plain, flips), x)
    for power in range(2, 2 + losses):
        output.pow(power).sum().backward(retain_graph=True)
    model, before = Checkpointed(kind, calls, reentrant), bits(plain)
    with LatentFlips(model, sites(model), flips):
        output = model(x)
        assert same_flips(differing(model, before), flips)
        for power in range(2, 2 + losses):
            output.pow(power).sum().backward(retain_graph=True)
            assert not any(map(len, differing(model, before).values()))
    for ours, expected in zip(gradients(model), gradients(plain), strict=True):
        # each reentrant backward adds what it has of a gradient by itself, in another order
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-6) if reentrant else torch.equal(ours, expected)
    for layer in binary_layers(model) if kind is Recording else ():
        assert len(layer.seen) >= 2
        assert all(torch.equal(seen, layer.seen[0]) for seen in layer.seen)
