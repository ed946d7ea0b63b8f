"""Training under flips in a plain loop that knows nothing of the code under test but what the error model draws."""

from itertools import chain, islice, repeat

import torch
from networks import Project, loader
from torch import nn

from bnnft.ber import Key, as_error_model

NAMES = ("net.0.weight", "net.3.weight", "net.6.weight")  # the binarized weights of Project


def drawn(module, errors, step, seed=0, names=NAMES):
    """Return for each weight's name the flat indices of the bits that are wrong in a step of training."""
    error_model, parameters = as_error_model(errors), dict(module.named_parameters())
    places = {name: place for place, name in enumerate(parameters)}
    keys = {name: Key(seed, step, purpose="training").at(places[name], name) for name in names}
    return {name: error_model.flips(parameters[name].detach(), key) for name, key in keys.items()}


def by_hand(errors, module=None, steps=12, gradient="straight_through", seed=0, names=NAMES, data=None):
    """Train so many steps; signs are flipped by multiplication and not by their bits.

    Args:
        errors: a rate or an error model, or a function that returns one for each step.
        names: of the weights whose signs are the bits.
        data: batches, six of eight samples if ``None``; again from the start as often as needed.
    """
    module = Project() if module is None else module
    module.train()
    optimizer = module.configure_optimizers()
    batches = chain.from_iterable(repeat(list(loader() if data is None else data)))
    for step, (x, y) in enumerate(islice(batches, steps)):
        flips = drawn(module, errors(step) if callable(errors) else errors, step, seed, names)
        multiply(module, flips)
        optimizer.zero_grad()
        share = 0.5 if gradient == "average" else 1.0
        (share * nn.functional.cross_entropy(module(x), y)).backward()
        for name, indices in flips.items():
            if gradient == "exact":
                module.get_parameter(name).grad.view(-1)[indices] *= -1
        multiply(module, flips)
        if gradient == "average":
            (share * nn.functional.cross_entropy(module(x), y)).backward()
        optimizer.step()
    return module


@torch.no_grad()
def multiply(module, flips):
    """Change the signs of latent weights at flat indices, by name."""
    for name, indices in flips.items():
        module.get_parameter(name).view(-1)[indices] *= -1


def flipped_weights(module, errors, step, names=NAMES):
    """Return weights with the flips of a step, made without a write; gradients pass straight through."""
    weights = {}
    for name, indices in drawn(module, errors, step, names=names).items():
        weight = module.get_parameter(name)
        change = torch.zeros_like(weight).view(-1)
        change[indices] = -2 * weight.detach().view(-1)[indices]
        weights[name] = weight + change.view_as(weight)
    return weights


def equal_weights(a, b, names=NAMES):
    """Return whether the binarized weights of two modules are bit-equal."""
    return all(torch.equal(a.get_parameter(name), b.get_parameter(name)) for name in names)
