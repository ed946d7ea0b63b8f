"""Which parameters of a model hold stored bits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnnft.ber.per_layer import matches
from bnnft.injection.operands import Operand, OperandWatch
from bnnft.nn import BinaryConv2d, BinaryLinear

# What selects weights: patterns of names, or a function of name and parameter.
Weights = Sequence[str] | Callable[[str, nn.Parameter], bool]


class Site(NamedTuple):
    """One parameter whose sign bits are stored bits.

    Attributes:
        name: the parameter's qualified name.
        weight: the latent weight.
        position: its place among all parameters of the model; part of the key of its random bits, so that a
            weight gets the same flips whichever others are selected with it.
        known: its layer is known to make its bits of the latent's signs.
        zero: the sign that the layer makes of a latent of exactly 0; ``None`` where its sign bit is the bit.
        operand: where the model computes with it, if it was watched.
        in_operand: turn the bits there, and not in the latent weight.
    """

    name: str
    weight: nn.Parameter
    position: int
    known: bool = False
    zero: int | None = None
    operand: Operand | None = None
    in_operand: bool = False

    @property
    def layer(self) -> str:
        """The qualified name of the module that computes with the weight."""
        return self.name.rpartition(".")[0] if self.operand is None else self.operand.module

    @property
    def fan_in(self) -> int:
        """Number of weights of one output neuron."""
        return self.weight.numel() // len(self.weight) if self.operand is None else self.operand.fan_in


# What a rule returns: attributes of a module that hold binarized latent weights, and what its layer makes of zeros.
_Latents = Mapping[str, int | None]


def _own_layers(module: nn.Module) -> _Latents:
    return {"weight": None} if isinstance(module, BinaryLinear | BinaryConv2d) else {}


def _brevitas(module: nn.Module) -> _Latents:
    proxy = getattr(module, "weight_quant", None)
    quantizer = getattr(proxy, "tensor_quant", None)
    name = getattr(quantizer, "original_name", type(quantizer).__name__)  # the first where it is compiled
    ours = type(proxy).__module__.startswith("brevitas.") and name in ("BinaryQuant", "ClampedBinaryQuant")
    return {"weight": 1} if ours else {}


def _bitorch(module: nn.Module) -> _Latents:
    # of linear layers, and of convolutions
    quantizer: Any = getattr(module, "weight_quantization", getattr(module, "_weight_quantize", None))
    if not type(quantizer).__module__.startswith("bitorch.") or quantizer.bit_width != 1:
        return {}
    zeros = {"Sign": 1, "ApproxSign": 1, "SwishSign": 1, "SteHeaviside": -1, "WeightDoReFa": -1}
    name = type(quantizer).__name__
    return {"weight": zeros[name]} if name in zeros else {}  # others are binary in eval mode only, or never


_RULES: tuple[Callable[[nn.Module], _Latents], ...] = (_own_layers, _brevitas, _bitorch)


class _Known(NamedTuple):
    name: str
    weight: nn.Parameter
    zero: int | None


def _known(model: nn.Module) -> Iterator[_Known]:
    for prefix, module in model.named_modules():
        for rule in _RULES:
            for attribute, zero in rule(module).items():
                weight = getattr(module, attribute)
                if isinstance(weight, nn.Parameter):
                    yield _Known(f"{prefix}.{attribute}" if prefix else attribute, weight, zero)


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
    known = {id(weight): name for name, weight, _ in reversed(list(_known(model)))}  # the first name of a tied weight
    chosen = set(known)
    if callable(weights):
        chosen = {id(weight) for name, weight in model.named_parameters() if weights(name, weight)}
        if not chosen:
            raise ValueError(f"weights: the function {weights!r} selects no parameter of {type(model).__name__}")
    elif weights is not None:
        chosen = set().union(*(_matches(model, pattern) for pattern in _patterns(weights)))
    named = ((name, weight) for name, weight in model.named_parameters() if id(weight) in chosen)
    return {known.get(id(weight), name): weight for name, weight in named}


def _patterns(weights: Sequence[str]) -> Sequence[str]:
    if isinstance(weights, str):
        raise TypeError(f"weights must be a list of patterns, got the string {weights!r}")
    return weights


def _matches(model: nn.Module, pattern: str) -> set[int]:
    """Return the identities of the parameters that a pattern selects: known weights first, else any."""
    known = [(name, weight) for name, weight, _ in _known(model)]
    found = {id(weight) for name, weight in known if matches(name, pattern)}
    everything = model.named_parameters(remove_duplicate=False)
    found = found or {id(w) for name, w in everything if fnmatchcase(name, pattern) and w.is_floating_point()}
    if not found:
        raise ValueError(
            f"weights: the pattern {pattern!r} matches no parameter; "
            f"binarized weights of this model: {', '.join(name for name, _ in known) or 'none'}"
        )
    return found


def known_sites(model: nn.Module, weights: Weights | None = None) -> list[Site]:
    """Return the sites of :func:`binarized_weights`, none if there are none."""
    return _sites(model, {id(weight): name for name, weight in binarized_weights(model, weights).items()}, {})


def _sites(model: nn.Module, chosen: Mapping[int, str], operands: Mapping[str, Operand]) -> list[Site]:
    """Return the sites of chosen parameters, given by their identities, with the names that they are to have."""
    zeros = {id(known.weight): known.zero for known in _known(model)}
    sites = []
    for position, (name, weight) in enumerate(model.named_parameters()):
        if id(weight) in chosen:
            operand, known = operands.get(name), id(weight) in zeros
            zero = zeros[id(weight)] if known else operand.zero if operand is not None else None
            sites.append(Site(chosen[id(weight)], weight, position, known, zero, operand))
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


def state_of(site: Site) -> dict[str, Any]:
    """Return what a checkpoint needs of a site, in plain types."""
    state = {"name": site.name, "known": site.known, "zero": site.zero, "in_operand": site.in_operand}
    return state | {"operand": None if site.operand is None else site.operand.state()}


def sites_of(model: nn.Module, states: Sequence[Mapping[str, Any]]) -> list[Site]:
    """Return the sites of :func:`state_of` in a model, none if it has other parameters."""
    parameters = dict(model.named_parameters())
    positions = {name: position for position, name in enumerate(parameters)}
    if not all(state["name"] in parameters for state in states):
        return []
    return [
        Site(
            operand=None if state["operand"] is None else Operand(**state["operand"]),
            weight=parameters[state["name"]],
            position=positions[state["name"]],
            **{field: state[field] for field in ("name", "known", "zero", "in_operand")},
        )
        for state in states
    ]


def no_sites(model: nn.Module) -> ValueError:
    """Return the error that a model has no binarized weights."""
    return ValueError(
        f"{type(model).__name__} has no binarized weights: none of its layers is known to be binarized. "
        "Use the layers of bnnft.nn, or name the latent weights with weights=['layer.weight', ...]"
    )


def watched_sites(
    model: nn.Module, watch: OperandWatch, weights: Weights | None = None, biases: bool = False
) -> list[Site]:
    """Return the sites of a model that was watched: known ones, and what else it computed with in binary.

    Args:
        model: the module that was watched.
        watch: of one forward of it.
        weights: patterns or a function; then only what they select.
        biases: take binary parameters of one dimension too.
    """
    known = binarized_weights(model, weights)
    operands = watch.operands()
    chosen = {id(weight): name for name, weight in known.items()}
    if weights is None:
        for name in operands:
            if watch.parameters[name].dim() > 1 or biases:
                chosen.setdefault(id(watch.parameters[name]), name)
    return _sites(model, chosen, operands)


def find_binarized_weights(
    model: nn.Module, *inputs: Tensor, weights: Weights | None = None, biases: bool = False
) -> dict[str, nn.Parameter]:
    """Return the binarized weights of any model, also of layers that nobody knows, by watching one forward.

    Float weights are left out; a float layer whose weights all have one magnitude, as some initializers make them,
    can't be told from a binary one.

    Args:
        model: any module; it runs once, in the mode it is in. Buffers and random streams are put back.
        inputs: of the model.
        weights: patterns or a function; then only what they select.
        biases: report binary biases too.

    Example:
        >>> class Mine(nn.Linear):
        ...     def forward(self, x):
        ...         return nn.functional.linear(x, self.weight + (self.weight.sign() - self.weight).detach())
        >>> model = nn.Sequential(Mine(16, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> list(find_binarized_weights(model, torch.ones(1, 16)))
        ['0.weight']
    """
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    watch = OperandWatch(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad(), watch:
        model(*inputs)
    for buffer, value in buffers:
        buffer.data.copy_(value)
    return {site.name: site.weight for site in watched_sites(model, watch, weights, biases)}
