"""Which parameters of a model hold stored bits: by what is known of a layer, by names, and by what it computes."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

from bnnft.ber.per_layer import matches
from bnnft.injection.known import Where, known_weights

# What selects weights: patterns of names, or a function of name and parameter.
Weights = Sequence[str] | Callable[[str, nn.Parameter], bool]


class Site(NamedTuple):
    """One parameter that holds stored bits.

    Attributes:
        name: the parameter's qualified name.
        weight: the parameter.
        position: its place among all parameters of the model; part of the key of its random bits, so that a
            weight gets the same flips whichever others are selected with it.
        where: its bits are flipped.
        known: its layer is known to make its bits of the latent's signs.
        zero: the sign that the layer makes of a latent of exactly 0; ``None`` where its sign bit is the bit.
        layer: the qualified name of the module that computes with it.
        fan_in: number of weights of one output neuron.
        scale: half the distance of the two values for each output neuron, ``None`` if it is 1 for all: a flip moves a
            neuron by twice that.
        like_latent: the bits were seen to be the latent's signs; ``None`` if nobody looked.
    """

    name: str
    weight: nn.Parameter
    position: int
    where: Where = "made"
    known: bool = False
    zero: int | None = None
    layer: str = ""
    fan_in: int = 0
    scale: Tensor | None = None
    like_latent: bool | None = None


def binarized_weights(model: nn.Module, weights: Weights | None = None) -> dict[str, nn.Parameter]:
    """Return the latent weights of a model that hold one stored bit an element.

    Args:
        model: any module.
        weights: ``None`` for all weights of layers that are known to be binarized; else patterns (as in a shell:
            ``*``, ``?``) of their qualified names, of their layers' names, or, for layers of your own, of any
            float parameters; or a function that is asked ``weights(name, parameter)`` for every parameter.

    Returns:
        Qualified name to parameter, in module order; a tied weight is there once, under its first name.

    Raises:
        ValueError: a pattern or the function selects nothing.

    Example:
        >>> from torch import nn
        >>> from bnnft.nn import BinaryLinear
        >>> model = nn.Sequential(BinaryLinear(8, 4), nn.BatchNorm1d(4), BinaryLinear(4, 2), nn.Linear(2, 2))
        >>> list(binarized_weights(model)), list(binarized_weights(model, ["2", "3.weight"]))
        (['0.weight', '2.weight'], ['2.weight', '3.weight'])
    """
    known = {id(each.weight): each.name for each in reversed(known_weights(model))}  # the first name of a tied weight
    chosen = set(known)
    if callable(weights):
        chosen = {id(weight) for name, weight in model.named_parameters() if weights(name, weight)}
        if not chosen:
            raise ValueError(f"weights: the function {weights!r} selects no parameter of {type(model).__name__}")
    elif weights is not None:
        chosen = set().union(*(_matches(model, pattern) for pattern in checked_weights(weights)))
    named = ((name, weight) for name, weight in model.named_parameters() if id(weight) in chosen)
    return {known.get(id(weight), name): weight for name, weight in named}


def checked_weights(weights: Any) -> Any:
    """Return what selects weights as it is, or raise if it can't select any.

    Raises:
        TypeError: neither a function nor a list of patterns.
        ValueError: an empty list.
    """
    if weights is None or callable(weights):
        return weights
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise TypeError(f"weights must be a list of patterns or a function, got {weights!r}")
    if wrong := [pattern for pattern in weights if not isinstance(pattern, str)]:
        raise TypeError(f"weights must be patterns of names, strings, got {wrong[0]!r}")
    if not weights:
        raise ValueError("weights must hold at least one pattern, got []; None selects all that are found")
    return weights


def _matches(model: nn.Module, pattern: str) -> set[int]:
    """Return the identities of the parameters that a pattern selects: known weights first, else any."""
    known = known_weights(model)
    found = {id(each.weight) for each in known if matches(each.name, pattern)}
    everything = model.named_parameters(remove_duplicate=False)
    found = found or {id(w) for name, w in everything if fnmatchcase(name, pattern) and w.is_floating_point()}
    if not found:
        raise ValueError(
            f"weights: the pattern {pattern!r} matches no parameter; "
            f"binarized weights of this model: {', '.join(each.name for each in known) or 'none'}"
        )
    return found


def known_sites(model: nn.Module, weights: Weights | None = None) -> list[Site]:
    """Return the sites of :func:`binarized_weights`, none if there are none."""
    chosen = {id(weight): name for name, weight in binarized_weights(model, weights).items()}
    known = {id(found.weight): found for found in reversed(known_weights(model))}
    sites = []
    for position, weight in enumerate(model.parameters()):
        if id(weight) in chosen:
            name, rule = chosen[id(weight)], known.get(id(weight))
            site = Site(name, weight, position, layer=name.rpartition(".")[0])
            site = site._replace(fan_in=weight.numel() // max(len(weight) if weight.dim() else 1, 1))
            if rule is not None:
                site = site._replace(known=True, zero=rule.zero, where=rule.where, like_latent=True)
            sites.append(site)
    return sites


def find_sites(model: nn.Module, weights: Weights | None = None) -> list[Site]:
    """Return the binarized weights of a model with their positions; arguments as of :func:`binarized_weights`.

    Raises:
        ValueError: there is none.
    """
    sites = known_sites(model, weights)
    if not sites:
        raise no_sites(model)
    return sites


def moved_sites(model: nn.Module, sites: Sequence[Site], known: Sequence[Site]) -> list[Site]:
    """Return the sites of a model whose parameters are others than before, or have other names or places.

    A site goes with its parameter. Where that is gone, another one under its name takes its place if the bits are
    flipped where they are made, since nothing is flipped then that holds no bits.
    """
    now = dict(model.named_parameters(remove_duplicate=False))
    weights = {id(weight): (place, weight) for place, weight in enumerate(model.parameters())}
    names = {id(weight): name for name, weight in reversed(now.items())}  # the first of a tied one
    kept = {id(site.weight): site for site in known}
    for site in sites:
        if id(site.weight) in weights:
            name = site.name if now.get(site.name) is site.weight else names[id(site.weight)]
            kept.setdefault(id(site.weight), site._replace(name=name))
    for site in sites:
        if id(site.weight) not in weights and site.where == "made" and site.name in now:
            kept.setdefault(id(now[site.name]), site)
    moved = [site._replace(position=weights[key][0], weight=weights[key][1]) for key, site in kept.items()]
    return sorted(moved, key=lambda site: site.position)


def first_names(model: nn.Module) -> dict[str, str]:
    """Return for each name of a parameter the one by which it is known, which is the first of a tied one."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


def state_of(site: Site) -> dict[str, Any]:
    """Return what a checkpoint needs of a site, in plain types."""
    fields = ("name", "known", "zero", "where", "layer", "fan_in", "like_latent")
    return {field: getattr(site, field) for field in fields}


def sites_of(model: nn.Module, states: Sequence[Mapping[str, Any]]) -> list[Site]:
    """Return the sites of :func:`state_of` in a model.

    Raises:
        ValueError: the model has no such parameter.
    """
    positions = {name: position for position, (name, _) in enumerate(model.named_parameters())}
    lost = [state["name"] for state in states if state["name"] not in positions]
    if lost:
        raise ValueError(
            f"the checkpoint has flips in {', '.join(lost)}, but {type(model).__name__} has no such parameters: "
            "resume with the model that was trained"
        )
    weights = dict(model.named_parameters())
    return [Site(weight=weights[state["name"]], position=positions[state["name"]], **state) for state in states]


def no_sites(model: nn.Module) -> ValueError:
    """Return the error that a model has no binarized weights."""
    return ValueError(
        f"{type(model).__name__} has no binarized weights: none of its layers is known to be binarized. "
        "Use the layers of bnnft.nn, or name the latent weights with weights=['layer.weight', ...]"
    )
