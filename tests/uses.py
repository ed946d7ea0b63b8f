"""What a model combines with its batch, seen from outside: the reference for every test of flips.

Nothing here knows how the package finds or flips bits. Two batches run through the model; an operand that is the same
in both, of an operation whose other operand differs, is a use of a weight.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

SEED = 11  # of the random numbers in every run, so that stochastic bits are the same in all


class Seen(TorchFunctionMode):
    """Keeps a copy of every operand of every operation: ``calls[number][place]``, ``None`` for other arguments."""

    def __init__(self):
        super().__init__()
        self.calls, self.names = [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_flatten((args, kwargs))[0]
        with torch._C.DisableTorchFunction():
            self.calls.append([copy_of(leaf) for leaf in leaves])
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **kwargs)


def copy_of(leaf):
    return leaf.detach().clone() if isinstance(leaf, Tensor) and leaf.layout == torch.strided else None


class Place(NamedTuple):
    """Which operand of which operation."""

    call: int
    number: int


def run(model, inputs, mode=None):
    """Run a model with the random numbers of every run; return what its outputs are."""
    torch.manual_seed(SEED)
    if mode is None:
        return model(*inputs)
    with mode:
        return model(*inputs)


def seen(model, inputs):
    """Return the operands of all operations of a forward."""
    mode = Seen()
    run(model, inputs, mode)
    return mode.calls


def places_of_uses(model, inputs, others):
    """Return the places of operands with two or more dimensions that are combined with the batch, in their order."""
    places = []
    for call, (one, other) in enumerate(zip(seen(model, inputs), seen(model, others), strict=True)):
        same = [
            a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)
            for a, b in zip(one, other, strict=True)
        ]
        known = [a is not None for a in one]
        if any(k and not s for k, s in zip(known, same, strict=True)):
            places += [Place(call, n) for n, s in enumerate(same) if s and is_weight(one[n])]
    return places


def are_equal(one, other):
    return one is not None and other is not None and torch.equal(one, other)


def is_weight(values):
    return values is not None and values.is_floating_point() and values.dim() > 1 and bool(values.any())


def others_of(values, line=None):
    """Return for each element the other one of -c and c, or of the two values along some dimensions."""
    return -values if line is None else values.amin(line, keepdim=True) + values.amax(line, keepdim=True) - values


class Replaced(TorchFunctionMode):
    """Puts the other of the two values into operands, where a mask says so, without a gradient of its own.

    Args:
        masks: for each place where bits are wrong.
        line: dimensions along which the two values are the same, if they are not -c and c.
        exact: the gradient of a wrong bit changes sign.
    """

    def __init__(self, masks, line=None, exact=False):
        super().__init__()
        self._masks, self._line, self._exact, self._call = masks, line, exact, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        leaves, tree = tree_flatten((args, kwargs or {}))
        with torch._C.DisableTorchFunction():
            for number, leaf in enumerate(leaves):
                if (mask := self._masks.get(Place(self._call, number))) is not None:
                    leaves[number] = self._with_flips(leaf, mask)
        self._call += 1
        args, kwargs = tree_unflatten(leaves, tree)
        return func(*args, **kwargs)

    def _with_flips(self, values, mask):
        other = others_of(values.detach(), self._line)
        if not self._exact:
            return values + torch.where(mask, other - values.detach(), 0.0)
        middle = (other + values.detach()) / 2
        return torch.where(mask, 2 * middle - values, values)


def masks(structure, model, places, flips):
    """Return for each place of a use where its bits are wrong, given flat indices for each parameter."""
    assert len(places) == len(structure.uses)
    found = {}
    for place, use in zip(places, structure.uses, strict=True):
        if use is not None:
            names, layout = use
            wrong = [mask_of(model, name, flips) for name in ([names] if isinstance(names, str) else names)]
            found[place] = layout(*wrong)
    return found


def mask_of(model, name, flips):
    """Return which elements of a parameter are among flat indices."""
    parameter = model.get_parameter(name)
    mask = torch.zeros(parameter.numel(), dtype=torch.bool)
    mask[flips[name]] = True
    return mask.view(parameter.shape)


def some_flips(model, names, share=0.3, seed=3):
    """Return sorted flat indices of a share of each parameter's elements."""
    generator, flips = torch.Generator().manual_seed(seed), {}
    for name in names:
        size = model.get_parameter(name).numel()
        flips[name] = torch.randperm(size, generator=generator)[: int(share * size)].sort().values
    return flips
