"""Turn bits of binary activations: in the output of the modules that make them."""

from collections.abc import Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bnnft.ber import ErrorModel, Key, checked_choice, checked_flips
from bnnft.injection.exchange import exchanged
from bnnft.nn import BinaryActivation
from bnnft.tracing.compiled import uncompiled

Target = Literal["weights", "activations", "both"]


def checked_target(target: str, activations: Sequence[str] | None) -> None:
    """Raise ValueError unless the argument names what is to be flipped, activations too if some are named."""
    checked_choice(target, Target, "target")
    if activations is not None and target == "weights":
        raise ValueError(f"activations are flipped with target='activations' or 'both', got {activations!r} without it")


def _is_binary(module: nn.Module) -> bool:
    """Return whether a module is known to put out two values: one of ours, of brevitas, or of bitorch."""
    if type(module).__module__ == "brevitas.nn.quant_activation":
        proxies = getattr(module, "act_quant", nn.Module()).modules()
        return any(type(proxy).__name__ in ("BinaryQuant", "ClampedBinaryQuant") for proxy in proxies)
    if type(module).__module__ == "bitorch.layers.qactivation":
        function = type(getattr(module, "activation_function", None)).__name__
        return function in ("Sign", "ApproxSign", "SwishSign", "SteHeaviside")
    return isinstance(module, BinaryActivation)


def find_activations(model: nn.Module, activations: Sequence[str] | None = None) -> list[str]:
    """Return the qualified names of the modules that put out binary activations.

    Args:
        model: any module.
        activations: patterns (as in a shell) of the names of modules with two output values; if ``None``, all
            :class:`bnnft.nn.BinaryActivation` and the binary activations of brevitas and bitorch.

    Raises:
        TypeError, ValueError: no list of patterns; a pattern matches no module, or there is no such module.

    Example:
        >>> from bnnft.nn import BinaryLinear
        >>> model = nn.Sequential(BinaryLinear(8, 4), nn.BatchNorm1d(4), BinaryActivation())
        >>> find_activations(model)
        ['2']
    """
    if isinstance(activations, str):
        raise TypeError(f"activations must be a list of patterns, got the string {activations!r}")
    names = [name for name, _ in model.named_modules() if name]
    if activations is None:
        found = {name for name, module in model.named_modules() if _is_binary(module)}
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no binary activation that is known. Name the modules that put out two "
                "values with activations=['block.act', ...]"
            )
    else:
        for pattern in activations:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"activations: the pattern {pattern!r} matches no module; there are {', '.join(names)}"
                )
        found = {name for name in names if any(fnmatchcase(name, pattern) for pattern in activations)}
    return [name for name in names if name in found]


class ActivationFlips:
    """Exchanges the two values of binary activations at drawn bits, in every forward while active.

    The activations of a batch are laid into the memory one sample after the other; each process of a distributed run
    has a memory of its own, with the same cells wrong. A module that runs several times has the same bits wrong each
    time, so that recomputed forwards see what the first ones saw. Compiled modules run uncompiled.

    Args:
        model: the module that is to run.
        names: of the modules, from :func:`find_activations`.
        error_model: which bits read wrong; stored bit 1 is the higher value.
        key: of the draw; each module has a position after all parameters in it.
        exact: let the gradient of a turned activation change sign; else it passes as if nothing was turned.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], error_model: ErrorModel, key: Key, exact: bool) -> None:
        self._model, self._names, self._error_model, self._key = model, names, error_model, key
        self._exact, self._stack = exact, ExitStack()

    def __enter__(self) -> None:
        if not self._names:
            return
        self._stack.enter_context(uncompiled())
        start = sum(1 for _ in self._model.parameters())
        for position, (name, module) in enumerate(self._model.named_modules(), start=start):
            if name in self._names:
                hook = partial(self._turn, self._key.at(position, name))
                self._stack.callback(module.register_forward_hook(hook).remove)

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def _turn(self, key: Key, module: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"activations: {key.name!r} puts out a {type(output).__name__} and no plain tensor "
                "(layers of brevitas do with return_quant_tensor=False)"
            )
        if not output.numel():
            return output
        values = output.detach()
        middle = _middle(values, key.name)
        flips = checked_flips(self._error_model.flips(values - middle, key), values, self._error_model, key.name)
        return exchanged(output, flips, middle, self._exact)


def _middle(values: Tensor, name: str) -> Tensor:
    """Return the middle of two values, 0 where there is one only.

    Raises:
        ValueError: there are more.
    """
    low, high = values.aminmax()
    if not bool(((values == low) | (values == high)).all()):
        raise ValueError(f"activations: the output of {name!r} is not binary: it has more than two values")
    return torch.where(low == high, 0.0, (low + high) / 2)
