"""Flips where bits are made: in every use exactly the drawn bits, in nothing else, and nothing is written."""

import copy
import pickle

import binarizers
import patterns
import pytest
import torch
from structures import STRUCTURES
from uses import Replaced, Seen, masks, others_of, places_of_uses, run, some_flips

from bnnft.ber import Independent, Key
from bnnft.injection.flipped import Injection, draw_flips

every_structure = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
both_gradients = pytest.mark.parametrize("exact", [False, True], ids=["straight-through", "exact"])


def injected(model, inputs, exact=False):
    """Return the injection of a model that was watched once."""
    injection = Injection(model, exact=exact)
    with injection.finder:
        run(model, inputs)
    injection.learn()
    injection.finder.bits.settle()
    return injection


def under(injection, flips, watch=False):
    return injection.under(flips, Independent(0.3), Key(0), watch=watch)


def bits_of(model):
    return {name: p.detach().clone().view(torch.int32) for name, p in model.named_parameters()}


def gradients(model, output, inputs=()):
    """Return the gradients of all parameters and of these inputs, zeros where there is none."""
    for tensor in (*model.parameters(), *inputs):
        tensor.grad = None
    if output.requires_grad:
        output.square().sum().backward()
    return [torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in (*model.parameters(), *inputs)]


def all_close(one, other):
    return all(bool((a - b).abs().max() <= 1e-4 * max(1, b.abs().max())) for a, b in zip(one, other, strict=True))


@every_structure
@pytest.mark.parametrize("watch", [False, True], ids=["", "watched"])
def test_every_use_shows_exactly_the_drawn_bits(structure, watch):
    """In training and in evaluation, with batches of other sizes than the one that was watched."""
    model = structure.model()
    injection = injected(model, structure.batch(6))
    flips = some_flips(model, structure.owners())
    for size, training in ((6, True), (5, False), (1, False)):
        model.train(training)
        inputs, others, clean, flipped = structure.batch(size), structure.batch(size, seed=2), Seen(), Seen()
        places = places_of_uses(structure.model().train(training), inputs, others)
        run(model, inputs, clean)
        with flipped, under(injection, flips, watch):
            flipped.calls.clear()
            run(model, inputs)
        for place, mask in masks(structure, model, places, flips).items():
            before, operand = clean.calls[place.call][place.number], flipped.calls[place.call][place.number]
            assert torch.allclose(operand, torch.where(mask, others_of(before, structure.line), before), atol=1e-6)


@every_structure
@both_gradients
def test_outputs_and_gradients_are_those_of_flips_by_hand(structure, exact):
    """The reference replaces the operands from outside; its gradients pass, or change sign at the flips."""
    model, inputs = structure.model(), structure.batch(6)
    places = places_of_uses(structure.model(), inputs, structure.batch(6, seed=2))
    flips = some_flips(model, structure.owners())
    reference = structure.model()
    expected = run(reference, inputs, Replaced(masks(structure, reference, places, flips), structure.line, exact))
    injection = injected(model, inputs, exact)
    if exact and not reaches(structure):
        with pytest.raises(RuntimeError, match="gradient='exact' can't reach the bits of"), under(injection, flips):
            gradients(model, run(model, inputs))
        return
    with under(injection, flips):
        output = run(model, inputs)
        found = gradients(model, output)
    assert torch.allclose(output, expected, atol=1e-4)
    if structure.passes:
        assert all_close(found, gradients(reference, expected))


def reaches(structure):
    """Return whether autograd connects what a model computes with to the parameters that hold its bits."""
    model = structure.model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in structure.owners())
    return run(model, structure.batch(6)).requires_grad and structure is not STRUCTURES["inside of a function"]


@every_structure
def test_nothing_is_written_to_a_parameter(structure):
    """Not by the flips: a forward that clamps its own weight, say, writes as often as without."""
    model, plain, inputs = structure.model(), structure.model(), structure.batch(6)
    injection, flips = injected(model, inputs), some_flips(model, structure.owners())
    run(plain, inputs)
    before = {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()}
    written = {name: -p._version for name, p in plain.named_parameters()}
    with under(injection, flips):
        output = run(model, inputs)
        inside = bits_of(model)
        gradients(model, output)
    gradients(plain, run(plain, inputs))
    for name, parameter in model.named_parameters():
        written[name] += plain.get_parameter(name)._version
        assert torch.equal(inside[name], plain.get_parameter(name).detach().view(torch.int32))
        assert torch.equal(bits_of(model)[name], inside[name])
        if name != "weight" or not hasattr(parameter, "org"):  # which puts other memory under its parameter
            assert (parameter.data_ptr(), parameter._version) == (before[name][0], before[name][1] + written[name])


@pytest.mark.parametrize("name", ["ste", "packed", "tied", "Stored", "convolution", "teacher"])
def test_copies_that_are_made_inside_are_clean_and_carry_no_flips(name):
    structure = STRUCTURES[name]
    model, inputs = structure.model(), structure.batch(6)
    clean, before = run(model, inputs), {name: value.clone() for name, value in model.state_dict().items()}
    injection, flips = injected(model, inputs), some_flips(model, structure.owners())
    with under(injection, flips):
        flipped = run(model, inputs)
        saved = {name: value.clone() for name, value in model.state_dict().items()}
        copied = copy.deepcopy(model)
    assert not torch.equal(flipped, clean)
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], before[name]) for name in before)
    assert torch.equal(run(copied, inputs), clean)
    assert torch.equal(run(model, inputs), clean)
    modules = [*model.modules(), *copied.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_always_called for m in modules)


def test_a_model_that_is_pickled_inside_is_clean():
    model = torch.nn.Sequential(patterns.SignFunction(20, 20), patterns.Stored(20, 20))
    inputs = (torch.randn(6, 20),)
    clean, injection = run(model, inputs), injected(model, inputs)
    with under(injection, some_flips(model, ["0.weight", "1.weight"])):
        copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(copied, inputs), clean)


class OnesRead(Independent):
    """All stored ones read wrong: what is flipped depends on bits that only the forward makes."""

    reads_bits = True

    def flips(self, weight, key):
        return (weight.reshape(-1) > 0).nonzero().squeeze(1)


ONE_USE = [*binarizers.SYMMETRIC, *binarizers.ASYMMETRIC]


@pytest.mark.parametrize("make", ONE_USE, ids=lambda make: make.__name__)
@both_gradients
def test_errors_that_depend_on_the_bits_read_those_that_are_made(make, exact):
    """Each element then has the lower one of the two values, whatever the latent is."""
    structure = STRUCTURES[make.__name__]
    model, inputs, seen = structure.model(), structure.batch(6), Seen()
    injection = injected(model, inputs, exact)
    errors = OnesRead(0.0)
    flips = draw_flips(injection.sites, errors, Key(0))
    if exact and not reaches(structure):
        return
    with seen, injection.under(flips, errors, Key(0)):
        seen.calls.clear()
        run(model, inputs)
    (place,) = places_of_uses(structure.model(), inputs, structure.batch(6, seed=2))
    clean = make(model.w).detach()
    lower = clean if make in binarizers.ASYMMETRIC else clean.abs()
    operand = seen.calls[place.call][place.number]
    assert torch.allclose(operand, 0 * lower if make in binarizers.ASYMMETRIC else -lower, atol=1e-6)
