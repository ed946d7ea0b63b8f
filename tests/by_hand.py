"""Training under flips in a plain loop, to compare with."""

from itertools import chain, islice, repeat

import torch
from networks import Project, loader
from torch import nn

from bnnft.ber import Independent, Key, as_error_model
from bnnft.injection.flipped import draw_flips
from bnnft.injection.sites import find_sites


def by_hand(errors, module=None, steps=12, gradient="straight_through", seed=0):
    """Train so many steps, six of them an epoch; signs are turned by multiplication and not by their bits.

    Args:
        errors: a rate or an error model, or a function that returns one for each step.
    """
    module = Project() if module is None else module
    module.train()
    sites, optimizer = find_sites(module), module.configure_optimizers()
    batches = chain.from_iterable(repeat(list(loader())))
    for step, (x, y) in enumerate(islice(batches, steps)):
        error_model = as_error_model(errors(step) if callable(errors) else errors)
        flips = draw_flips(sites, error_model, Key(seed, step, purpose="training"))
        for site in sites:
            site.weight.data.view(-1)[flips[site.name]] *= -1
        optimizer.zero_grad()
        share = 0.5 if gradient == "average" else 1.0
        (share * nn.functional.cross_entropy(module(x), y)).backward()
        for site in sites:
            if gradient == "exact":
                site.weight.grad.view(-1)[flips[site.name]] *= -1
            site.weight.data.view(-1)[flips[site.name]] *= -1
        if gradient == "average":
            (share * nn.functional.cross_entropy(module(x), y)).backward()
        optimizer.step()
    return module


def turned(net, rate, step):
    """Weights with the flips of a step, made by multiplication and without a write; gradients pass straight through."""
    weights = {}
    for name, indices in draw_flips(find_sites(net), Independent(rate), Key(0, step, purpose="training")).items():
        weight = net.get_parameter(name)
        change = torch.zeros_like(weight).view(-1)
        change[indices] = -2 * weight.detach().view(-1)[indices]
        weights[name] = weight + change.view_as(weight)
    return weights


def equal_weights(a, b):
    """Tell whether the binarized weights of two modules are bit-equal."""
    return all(torch.equal(x.weight, y.weight) for x, y in zip(find_sites(a), find_sites(b), strict=True))
