"""Another error model for each layer."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

import torch
from torch import Tensor

from bnnft.ber.checks import checked_scale
from bnnft.ber.composition import Composition
from bnnft.ber.conversion import as_error_model, unwrapped
from bnnft.ber.error_model import ErrorModel
from bnnft.ber.random_bits import Key


@dataclass(frozen=True)
class PerLayer(Composition):
    """Each layer has the errors of the pattern that matches its name, and where several do, of the most exact one.

    The most exact pattern is the one with the most letters that are no ``*`` or ``?``; the order does not matter: of
    equally exact patterns the last by the alphabet counts. A weight that no pattern matches has no errors.

    Args:
        rates: a rate or an error model for each pattern (as in a shell: ``*``, ``?``) of the weights' qualified names
            or of their layers' names; 5 % of the bits of all layers if ``None``.
        scale: multiplies all rates, >= 0: what a curve over the rate of all layers together goes over.

    Raises:
        TypeError, ValueError: a rate is out of range; when flips are drawn, a pattern matches no weight.

    Example:
        >>> import torch
        >>> from bnnft.ber import Key
        >>> model = PerLayer({"*fc1*": 0.1, "*fc*": 0.01})
        >>> weight = torch.randn(100, 100)
        >>> [len(model.flips(weight, Key(name=name))) for name in ("fc1.weight", "fc2.weight", "conv.weight")]
        [1035, 107, 0]
    """

    rates: Mapping[str, float | ErrorModel] | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        rates = {"*": 0.05} if self.rates is None else self.rates
        if not isinstance(rates, Mapping) or not rates:
            raise TypeError(f"rates must map one or more patterns to rates or error models, got {rates!r}")
        if wrong := [pattern for pattern in rates if not isinstance(pattern, str)]:
            raise TypeError(f"rates must map patterns of names, strings, to rates or error models, got {wrong[0]!r}")
        object.__setattr__(self, "scale", checked_scale(self.scale))
        object.__setattr__(self, "rates", {pattern: unwrapped(rate) for pattern, rate in rates.items()})
        assert self.models  # built now, so that it raises now

    @cached_property
    def models(self) -> Mapping[str, ErrorModel]:
        """The error model of each pattern, with the scale on its rate."""
        assert self.rates is not None
        return {pattern: as_error_model(rate).scaled(self.scale) for pattern, rate in self.rates.items()}

    @property
    def parts(self) -> Collection[ErrorModel]:
        """The error models of all patterns, with the scale on their rates."""
        return self.models.values()

    def check_layers(self, names: Sequence[str]) -> None:
        """Raise ValueError if a pattern matches none of these weights, or its error model does not fit one of them."""
        for pattern in self.models:
            if not any(matches(name, pattern) for name in names):
                raise ValueError(f"rates: the pattern {pattern!r} matches no weight; there are {', '.join(names)}")
        for name in names:
            if model := self._model(name):
                model.check_layers([name])

    def bit_rates(self, name: str = "") -> tuple[float, float] | None:
        """Return the rates of the pattern that matches a weight's name."""
        model = self._model(name)
        return (0.0, 0.0) if model is None else model.bit_rates(name)

    def flips(self, weight: Tensor, key: Key) -> Tensor:
        """Return the sorted flat indices of the bits that read wrong in this draw, by the name in the key."""
        model = self._model(key.name)
        return torch.empty(0, dtype=torch.int64, device=weight.device) if model is None else model.flips(weight, key)

    def _model(self, name: str) -> ErrorModel | None:
        matching = [pattern for pattern in self.models if matches(name, pattern)]
        exactness = (len(pattern.replace("*", "").replace("?", "")) for pattern in matching)
        return self.models[max(zip(exactness, matching, strict=True))[1]] if matching else None


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern (as in a shell) is that of a weight's qualified name, or of its layer's.

    Example:
        >>> matches("fc1.weight", "fc1"), matches("fc1.weight", "*.weight"), matches("fc1.weight", "fc")
        (True, True, False)
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)
