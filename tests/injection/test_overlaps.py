"""Flips that overlap, several batches with flips of their own, and backwards of several kinds under them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from leftovers import assert_nothing_left
from operands import Operands, changed
from patterns import Organized, SignFunction, TorchSign
from torch import nn

from bnnft import flipped
from bnnft.ber import Independent, Key
from bnnft.nn import BinaryActivation, BinaryLinear

NAMES = ["0.weight", "2.weight", "4.weight"]
both_gradients = pytest.mark.parametrize("gradient", ["straight_through", "exact"])
every_how = pytest.mark.parametrize("how", ["auto", "operand", "latent"])


def own(inputs, outputs):
    return BinaryLinear(inputs, outputs, bias=False)


every_layer = pytest.mark.parametrize("layer", [own, SignFunction])


def network(layer=own):
    torch.manual_seed(0)
    first, second, third = (layer(*size) for size in ((20, 16), (16, 12), (12, 3)))
    return nn.Sequential(first, BinaryActivation(), second, BinaryActivation(), third)


def drawn(model, rate, seed):
    """Sets of the wrong bits of the weights of a network by name."""
    weights = enumerate(model.named_parameters())
    return {name: set(Independent(rate).flips(weight, Key(seed, 0, i)).tolist()) for i, (name, weight) in weights}


def symmetric_difference(*flips):
    """What several flips leave wrong: a bit that two of them flip is right."""
    left = {name: set() for name in NAMES}
    for each in flips:
        left = {name: bits ^ each[name] for name, bits in left.items()}
    return left


@every_layer
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 1, 0), (1, 0, 2)])
def test_overlapping_flips_are_restored_in_any_order(layer, order):
    model, seen = network(layer), []
    clean = [weight.detach().sign() for weight in model.parameters()]
    with Operands() as operands:  # outside of all others
        contexts = [flipped(model, 0.5, seed=seed, weights=NAMES) for seed in range(3)]
        for context in contexts:
            context.__enter__()
        for number in (None, *order):
            if number is not None:
                contexts[number].__exit__(None, None, None)
            model(torch.randn(4, 20))
    for step in operands.steps(3):
        pairs = zip(NAMES, clean, step, strict=True)
        seen.append({name: set(changed(signs, operand).tolist()) for name, signs, operand in pairs})
    flips = [drawn(model, 0.5, seed) for seed in range(3)]
    assert seen == [symmetric_difference(*(flips[number] for number in order[done:])) for done in range(4)]
    assert_nothing_left(model)


@every_how
def test_weights_made_in_inference_mode_are_flipped_and_restored(how):
    with torch.inference_mode():
        model, x = own(8, 4), torch.randn(3, 8)
        before, clean = model.weight.clone(), model(x)
        with flipped(model, 0.5, how=how) as flips:
            signs = before.sign()
            signs.view(-1)[flips["weight"]] *= -1
            assert torch.equal(model(x), F.linear(x, signs))
        assert torch.equal(model.weight, before)
        assert torch.equal(model(x), clean)
    assert len(flips["weight"]) > 3


def explicit_gradients(model, x, flips, exact):
    """The loop written by hand: flipped signs as leaves, their gradients, negated where a bit is flipped."""
    signs, factors = [], []
    for name, weight in model.named_parameters():
        factor = torch.ones(weight.numel())
        factor[flips[name]] = -1
        factors.append(factor.view_as(weight))
        signs.append((weight.detach().sign() * factors[-1]).requires_grad_())
    hidden = x
    for sign in signs[:-1]:
        hidden = BinaryActivation()(F.linear(hidden, sign))
    gradients = torch.autograd.grad(F.linear(hidden, signs[-1]).pow(2).mean(), signs)
    return [gradient * factor if exact else gradient for gradient, factor in zip(gradients, factors, strict=True)]


@every_how
@every_layer
@both_gradients
def test_accumulation_over_two_flips_takes_each_batch_with_its_own_flips(gradient, layer, how):
    """And one that has none."""
    model, batches, expected = network(layer), torch.randn(3, 8, 20), []
    for draw, x in enumerate(batches[:2]):
        with flipped(model, 0.3, draw=draw, gradient=gradient, how=how, weights=NAMES) as flips:
            model(x).pow(2).mean().backward()
        expected.append(explicit_gradients(model, x, flips, gradient == "exact"))
    nothing = {name: torch.tensor([], dtype=torch.int64) for name in flips}
    model(batches[2]).pow(2).mean().backward()
    expected.append(explicit_gradients(model, batches[2], nothing, exact=True))
    for weight, (first, second, clean) in zip(model.parameters(), zip(*expected, strict=True), strict=True):
        assert torch.equal(weight.grad, first + second + clean)
        assert not torch.equal(first, clean)


@every_layer
@both_gradients
@pytest.mark.parametrize("forwards", [1, 2])
def test_layers_that_are_found_have_the_gradient_of_their_flips_in_each_forward(gradient, layer, forwards):
    model, x = network(layer), torch.randn(8, 20)
    with flipped(model, 0.3, gradient=gradient) as flips:
        for _ in range(forwards):
            loss = model(x).pow(2).mean()
        loss.backward()
    expected = explicit_gradients(model, x, flips, gradient == "exact")
    assert all(torch.equal(w.grad, e) for w, e in zip(model.parameters(), expected, strict=True))
    assert not torch.equal(expected[0], explicit_gradients(model, x, flips, gradient != "exact")[0])


@every_layer
@both_gradients
def test_backward_may_run_after_the_bits_are_restored_where_they_are_flipped_as_they_are_made(gradient, layer):
    model, x = network(layer), torch.randn(8, 20)
    with flipped(model, 0.3, gradient=gradient) as flips:
        loss = model(x).pow(2).mean()
    loss.backward()
    expected = explicit_gradients(model, x, flips, gradient == "exact")
    assert all(torch.equal(w.grad, e) for w, e in zip(model.parameters(), expected, strict=True))


@every_layer
@every_how
def test_exact_gradient_of_a_weight_used_twice_is_negated_once(layer, how):
    layer, x, gradients = layer(6, 6), torch.randn(4, 6), []
    for gradient in ("straight_through", "exact"):
        with flipped(layer, 0.3, gradient=gradient, how=how, weights=["weight"]) as flips:
            loss = layer(layer(x)).sum()
            gradients += torch.autograd.grad(loss, layer.weight)
    assert len(flips["weight"]) > 3
    gradients[0].view(-1)[flips["weight"]] *= -1
    assert torch.equal(*gradients)


@every_how
@every_layer
@both_gradients
def test_frozen_weights_are_flipped_and_get_no_gradient(gradient, layer, how):
    model, x = network(layer), torch.randn(8, 20)
    model[2].weight.requires_grad_(False)
    before = model[2].weight.clone()
    with flipped(model, 0.3, gradient=gradient, how=how, weights=NAMES) as flips:
        model(x).pow(2).mean().backward()
    expected = explicit_gradients(model, x, flips, gradient == "exact")
    assert torch.equal(model[0].weight.grad, expected[0])
    assert model[2].weight.grad is None
    assert torch.equal(model[4].weight.grad, expected[2])
    assert torch.equal(model[2].weight, before)


@every_how
@every_layer
def test_second_derivatives_go_through_an_exact_flip(layer, how):
    """At rate 1 the gradient of a linear layer's weight is -x, and its derivative by x is -1."""
    model, x = layer(4, 1), torch.randn(1, 4, requires_grad=True)
    with flipped(model, 1.0, gradient="exact", how=how, weights=["weight"]):
        (gradient,) = torch.autograd.grad(model(x).sum(), model.weight, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), x)
    assert torch.equal(gradient, -x)
    assert second.tolist() == [[-1.0] * 4]


@every_how
def test_copies_of_layers_that_nobody_knows_are_clean_and_carry_no_hooks(how):
    """The model itself goes on with its flips."""
    model, x = network(SignFunction), torch.randn(4, 20)
    clean = model(x)
    with flipped(model, 0.3, how=how, weights=NAMES):
        flips = model(x)
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert torch.equal(model(x), flips)
    assert not torch.equal(flips, clean)
    for other in copies:
        assert torch.equal(other(x), clean)
        assert_nothing_left(other)


def test_an_old_latent_beside_its_parameter_survives():
    """``weight.org``, whose signs each forward writes over its parameter."""
    model, x = nn.Sequential(Organized(20, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(4, 20)
    clean, latent = model(x), model[0].weight.org.clone()
    with flipped(model, 0.3) as flips:
        assert not torch.equal(model(x), clean)
    assert len(flips["0.weight"]) > 50
    assert torch.equal(model[0].weight.org, latent)
    assert torch.equal(model(x), clean)


@pytest.mark.parametrize(("weights", "names"), [(None, ["0.weight", "2.weight"]), (["2.weight"], ["2.weight"])])
def test_biases_and_weights_that_are_not_selected_stay_as_they_are(weights, names):
    torch.manual_seed(0)
    model = nn.Sequential(TorchSign(20, 16), nn.ReLU(), TorchSign(16, 3))
    x, clean = torch.randn(4, 20), [parameter.detach().sign() for parameter in model.parameters()]
    with Operands() as operands, flipped(model, 0.3, weights=weights) as flips:
        model(x)
        output = model(x)
    assert list(flips) == names
    for place, name in ((0, "0.weight"), (2, "2.weight")):
        if name in flips:
            clean[place].view(-1)[flips[name]] *= -1
    assert [torch.equal(a.sign(), b) for a, b in zip(operands.seen, clean[::2] * 2, strict=True)] == [True] * 4
    hidden = F.linear(x, clean[0], clean[1]).relu()
    assert torch.allclose(output, F.linear(hidden, clean[2], clean[3]), atol=1e-5)
