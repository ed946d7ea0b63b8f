"""Several kinds of bit errors in one memory."""

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from bnnft.ber.error_model import ErrorModel, check_layers, checked_scale, in_one_list, reads_bits, scaled, sources
from bnnft.ber.independent import as_error_model
from bnnft.ber.random_bits import Key


@dataclass(frozen=True)
class Sequence:
    """Bit errors one after the other: a bit that is turned twice is right again.

    Each error model reads the bits that the ones before it left.

    Args:
        models: rates or error models, the first comes first.
        scale: multiplies all rates, >= 0: what a curve over the rate of all of them together sweeps.

    Raises:
        TypeError, ValueError: no error model, or a rate is out of range.

    Example:
        >>> import torch
        >>> from bnnft.ber import Chip, Independent, Key
        >>> weight, key = torch.randn(100, 100), Key(seed=1)
        >>> model = Sequence([Chip(0.05, chip=7), Independent(0.01)])
        >>> len(Chip(0.05, chip=7).flips(weight, key)), len(model.flips(weight, key))
        (496, 580)
    """

    models: AbstractSequence[float | ErrorModel]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.models, AbstractSequence) or not self.models:
            raise TypeError(f"models must be a list of one or more rates or error models, got {self.models!r}")
        object.__setattr__(self, "scale", checked_scale(self.scale))
        object.__setattr__(self, "models", tuple(self.models))
        assert self.parts  # built now, so that it raises now

    @cached_property
    def parts(self) -> tuple[ErrorModel, ...]:
        """The error models, with the scale on their rates."""
        return tuple(scaled(as_error_model(model), self.scale) for model in self.models)

    @property
    def reads_bits(self) -> bool:
        """Whether flips depend on what is stored."""
        return any(map(reads_bits, self.parts))

    @property
    def source(self) -> str:
        """Where the figures of its error models are published."""
        return sources(self.parts)

    def check_layers(self, names: AbstractSequence[str]) -> None:
        """Raise ValueError if one of the error models does not fit these weights."""
        for part in self.parts:
            check_layers(part, names)

    def flips(self, weight: Tensor, key: Key) -> Tensor:
        """Return the sorted flat indices of the bits that read wrong in the end."""
        flips = self.parts[0].flips(weight, key.part(0))
        for number, part in enumerate(self.parts[1:], start=1):
            read = _turned(weight, flips) if reads_bits(part) else weight
            flips = in_one_list(flips, part.flips(read, key.part(number)), weight.numel())
        return flips


def _turned(weight: Tensor, flips: Tensor) -> Tensor:
    copy = weight.detach().clone().reshape(-1)
    copy[flips] = -copy[flips]
    return copy.view(weight.shape)
