"""Which parameters of a model hold stored bits."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from bnnft.nn import BinaryConv2d, BinaryLinear


class Site(NamedTuple):
    """One parameter whose sign bits are stored bits.

    Attributes:
        name: the parameter's qualified name.
        weight: the latent weight.
        position: its place among all parameters of the model; part of the key of its random bits, so that a
            weight gets the same flips whichever others are selected with it.
    """

    name: str
    weight: nn.Parameter
    position: int

    @property
    def layer(self) -> str:
        """The qualified name of the module that holds the weight."""
        return self.name.rpartition(".")[0]


def _own_layers(module: nn.Module) -> Iterable[str]:
    return ("weight",) if isinstance(module, BinaryLinear | BinaryConv2d) else ()


# a rule names the attributes of a module that hold binarized latent weights
_RULES: tuple[Callable[[nn.Module], Iterable[str]], ...] = (_own_layers,)


def _known(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for prefix, module in model.named_modules():
        for rule in _RULES:
            for attribute in rule(module):
                weight = getattr(module, attribute)
                if isinstance(weight, nn.Parameter):
                    yield f"{prefix}.{attribute}" if prefix else attribute, weight


def binarized_weights(model: nn.Module, weights: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """Return the latent weights of a model that hold one stored bit an element.

    Args:
        model: any module.
        weights: ``None`` for all weights of layers that are known to be binarized; else patterns (as in a shell:
            ``*``, ``?``) of their qualified names, of their layers' names, or, for layers of your own, of any
            float parameters.

    Returns:
        Qualified name to parameter, in module order; a tied weight is there once, under its first name.

    Raises:
        ValueError: a pattern matches nothing.

    Example:
        >>> from torch import nn
        >>> from bnnft.nn import BinaryLinear
        >>> model = nn.Sequential(BinaryLinear(8, 4), nn.BatchNorm1d(4), BinaryLinear(4, 2), nn.Linear(2, 2))
        >>> list(binarized_weights(model)), list(binarized_weights(model, ["2", "3.weight"]))
        (['0.weight', '2.weight'], ['2.weight', '3.weight'])
    """
    known = {id(weight): name for name, weight in reversed(list(_known(model)))}  # the first name of a tied weight
    chosen = set(known)
    if weights is not None:
        chosen = set().union(*(_matches(model, pattern) for pattern in _patterns(weights)))
    named = ((name, weight) for name, weight in model.named_parameters() if id(weight) in chosen)
    return {known.get(id(weight), name): weight for name, weight in named}


def _patterns(weights: Sequence[str]) -> Sequence[str]:
    if isinstance(weights, str):
        raise TypeError(f"weights must be a list of patterns, got the string {weights!r}")
    return weights


def _matches(model: nn.Module, pattern: str) -> set[int]:
    """Return the identities of the parameters that a pattern selects: known weights first, else any."""
    known = list(_known(model))
    found = {id(w) for name, w in known if any(fnmatchcase(n, pattern) for n in (name, name.rpartition(".")[0]))}
    everything = model.named_parameters(remove_duplicate=False)
    found = found or {id(w) for name, w in everything if fnmatchcase(name, pattern) and w.is_floating_point()}
    if not found:
        raise ValueError(
            f"weights: the pattern {pattern!r} matches no parameter; "
            f"binarized weights of this model: {', '.join(name for name, _ in known) or 'none'}"
        )
    return found


def find_sites(model: nn.Module, weights: Sequence[str] | None = None) -> list[Site]:
    """Return the binarized weights of a model with their positions; arguments as of :func:`binarized_weights`.

    Raises:
        ValueError: there is none.
    """
    found = binarized_weights(model, weights)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no binarized weights: none of its layers is known to be binarized. "
            "Use the layers of bnnft.nn, or name the latent weights with weights=['layer.weight', ...]"
        )
    positions = {id(weight): position for position, weight in enumerate(model.parameters())}
    return [Site(name, weight, positions[id(weight)]) for name, weight in found.items()]
