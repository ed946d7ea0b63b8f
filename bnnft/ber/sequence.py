"""Several kinds of bit errors in one memory."""

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bnnft.ber.checks import checked_flips, checked_scale
from bnnft.ber.composition import Composition
from bnnft.ber.conversion import as_error_model, unwrapped
from bnnft.ber.error_model import ErrorModel
from bnnft.ber.random_bits import Key, where_true


@dataclass(frozen=True)
class Sequence(Composition):
    """Bit errors one after the other: a bit that is flipped twice is right again.

    Each error model reads the bits that the ones before it left.

    Args:
        models: rates or error models, the first comes first.
        scale: multiplies all rates, >= 0: what a curve over the rate of all of them together goes over.

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
        object.__setattr__(self, "models", tuple(map(unwrapped, self.models)))
        assert self.parts  # built now, so that it raises now

    @cached_property
    def parts(self) -> tuple[ErrorModel, ...]:
        """The error models, with the scale on their rates."""
        return tuple(as_error_model(model).scaled(self.scale) for model in self.models)

    def check_layers(self, names: AbstractSequence[str]) -> None:
        """Raise ValueError if one of the error models does not fit these weights."""
        for part in self.parts:
            part.check_layers(names)

    def bit_rates(self, name: str = "") -> tuple[float, float] | None:
        """Return the share of zeros and ones that read wrong in the end; one die twice is not known."""
        chips = [chip for part in self.parts if (chip := getattr(part, "chip", None)) is not None]
        zeros, ones = 0.0, 0.0
        for part in self.parts:
            rates = part.bit_rates(name)
            if rates is None or len(set(chips)) < len(chips):
                return None
            to_1, to_0 = rates
            zeros, ones = zeros * (1 - to_0) + (1 - zeros) * to_1, ones * (1 - to_1) + (1 - ones) * to_0
        return zeros, ones

    def flips(self, weight: Tensor, key: Key) -> Tensor:
        """Return the sorted flat indices of the bits that read wrong in the end."""
        flips = self._flips(0, weight, key)
        for number in range(1, len(self.parts)):
            read = _flipped(weight, flips) if self.parts[number].reads_bits else weight
            flips = in_one_list(flips, self._flips(number, read, key), weight.numel())
        return flips

    def _flips(self, number: int, weight: Tensor, key: Key) -> Tensor:
        part = self.parts[number]
        return checked_flips(part.flips(weight, key.part(number)), weight, part, key.name)


def in_one_list(first: Tensor, second: Tensor, size: int) -> Tensor:
    """Return the sorted indices below ``size`` that are in one of two lists only: a bit flipped twice is right again.

    Example:
        >>> import torch
        >>> in_one_list(torch.tensor([1, 2]), torch.tensor([2, 5]), size=6)
        tensor([1, 5])
    """
    flipped = torch.zeros(size, dtype=torch.bool, device=first.device)
    flipped[first] = True
    flipped[second] = ~flipped[second]
    return where_true(flipped)


def _flipped(weight: Tensor, flips: Tensor) -> Tensor:
    copy = weight.detach().clone().reshape(-1)
    copy[flips] = -copy[flips]
    return copy.view(weight.shape)
