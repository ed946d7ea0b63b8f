"""Another error model for each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from torch import Tensor

from bnnft.ber.error_model import ErrorModel, check_layers, checked_scale, reads_bits, scaled, sources
from bnnft.ber.independent import as_error_model
from bnnft.ber.random_bits import Key


@dataclass(frozen=True)
class PerLayer:
    """Each layer has the errors of the pattern that matches its name, and where several do, of the most exact one.

    The most exact pattern is the one with the most letters that are no ``*`` or ``?``; the order does not matter.

    Args:
        rates: a rate or an error model for each pattern (as in a shell: ``*``, ``?``) of the weights' qualified names
            or of their layers' names.
        scale: multiplies all rates, >= 0: what a curve over the rate of all layers together sweeps.

    Raises:
        TypeError, ValueError: a rate is out of range; when flips are drawn, a pattern matches no weight, or no pattern
            matches a weight.

    Example:
        >>> import torch
        >>> from bnnft.ber import Key
        >>> model = PerLayer({"*fc1*": 0.1, "*": 0.01})
        >>> weight = torch.randn(100, 100)
        >>> [len(model.flips(weight, Key(name=name))) for name in ("fc1.weight", "fc2.weight")]
        [1035, 107]
    """

    rates: Mapping[str, float | ErrorModel]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.rates, Mapping) or not self.rates:
            raise TypeError(f"rates must map one or more patterns to rates or error models, got {self.rates!r}")
        object.__setattr__(self, "scale", checked_scale(self.scale))
        object.__setattr__(self, "rates", dict(self.rates))
        assert self.models  # built now, so that it raises now

    @cached_property
    def models(self) -> Mapping[str, ErrorModel]:
        """The error model of each pattern, with the scale on its rate."""
        return {pattern: scaled(as_error_model(rate), self.scale) for pattern, rate in self.rates.items()}

    @property
    def reads_bits(self) -> bool:
        """Whether flips depend on what is stored."""
        return any(map(reads_bits, self.models.values()))

    @property
    def source(self) -> str:
        """Where the figures of its error models are published."""
        return sources(self.models.values())

    def check_layers(self, names: Sequence[str]) -> None:
        """Raise ValueError if a pattern matches none of these weights, or one of them no pattern."""
        for pattern in self.rates:
            if not any(matches(name, pattern) for name in names):
                raise ValueError(f"rates: the pattern {pattern!r} matches no weight; there are {', '.join(names)}")
        for name in names:
            check_layers(self._model(name), [name])

    def flips(self, weight: Tensor, key: Key) -> Tensor:
        """Return the sorted flat indices of the bits that read wrong in this draw, by the name in the key."""
        return self._model(key.name).flips(weight, key)

    def _model(self, name: str) -> ErrorModel:
        matching = [pattern for pattern in self.rates if matches(name, pattern)]
        if not matching:
            raise ValueError(f"rates: no pattern matches the weight {name!r}; there are {', '.join(self.rates)}")
        return self.models[max(matching, key=lambda pattern: len(pattern.replace("*", "").replace("?", "")))]


def matches(name: str, pattern: str) -> bool:
    """Tell whether a pattern (as in a shell) is that of a weight's qualified name, or of its layer's.

    Example:
        >>> matches("fc1.weight", "fc1"), matches("fc1.weight", "*.weight"), matches("fc1.weight", "fc")
        (True, True, False)
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)
