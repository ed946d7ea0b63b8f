"""At which errors batch norms gathered their statistics: taken down for each weight while a model trains under errors.

A running mean of sums under errors is what is left of the clean one. Who corrects thresholds for the errors of a memory
has to know how much that was.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from bnnft.ber import ErrorModel
from bnnft.injection.sites import Site

# rates of a stored 0 and a stored 1; None where an error model did not say them
Rates = tuple[float, float] | None

_MOMENTUM = 0.1  # of running statistics, as torch's batch norms have it


def note(model: nn.Module, sites: Iterable[Site], error_model: ErrorModel) -> None:
    """Take down that a batch ran under an error model: running rates go with running statistics.

    Example:
        >>> from bnnft.ber import Independent
        >>> from bnnft.injection.sites import known_sites
        >>> from bnnft.nn import BinaryLinear
        >>> model = nn.Sequential(BinaryLinear(4, 2))
        >>> note(model, known_sites(model), Independent(0.1))
        >>> gathered_at(model)
        {'0.weight': (0.1, 0.1)}
    """
    kept = gathered_at(model)
    for site in sites:
        rates = error_model.bit_rates(site.name)
        before = kept.get(site.name, rates)
        if rates is not None and before is not None and before != rates:
            zeros, ones = (old + _MOMENTUM * (new - old) for old, new in zip(before, rates, strict=True))
            rates = zeros, ones
        if site.name not in kept or kept[site.name] != rates:
            take_down(model, {site.name: rates})


def gathered_at(model: nn.Module) -> dict[str, Rates]:
    """Return the rates under which sums with each weight were averaged, by the weights' names."""
    return {
        f"{name}.{weight}" if name else weight: rates
        for name, module in model.named_modules()
        for weight, rates in vars(module).get("gathered_at", {}).items()
    }


def take_down(model: nn.Module, gathered: Mapping[str, Any]) -> None:
    """Keep rates at the modules that have the weights; names that the model doesn't have are passed over."""
    modules = dict(model.named_modules())
    for name, rates in gathered.items():
        owner, _, weight = name.rpartition(".")
        if owner in modules:
            attributes: Any = vars(modules[owner])
            kept = attributes.get("gathered_at", {})
            attributes["gathered_at"] = {**kept, weight: None if rates is None else tuple(rates)}
