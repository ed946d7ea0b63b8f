"""Bits stored under a mask, so that one-sided errors fall on ones and zeros alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bnnft.ber.checks import checked_number, checked_scale
from bnnft.ber.composition import Composition
from bnnft.ber.conversion import as_error_model, unwrapped
from bnnft.ber.error_model import ErrorModel
from bnnft.ber.random_bits import Key, places_below


@dataclass(frozen=True)
class Scrambled(Composition):
    """Bits are stored XORed with a fixed random mask, and XORed with it again as they are read.

    Errors that know ones from zeros, one-sided ones or stuck cells, then fall on both alike: in the mean they are
    symmetric, whatever their rates are, and nothing has to be known of them. It costs no bit: the mask is made anew
    from its number by a counter or a shift register.

    Args:
        model: of the memory: a rate or an error model.
        mask: number of the mask, >= 0.
        scale: multiplies all rates, >= 0: what a curve goes over.

    Raises:
        TypeError, ValueError: an argument is out of range.

    Source: data scrambling as memory controllers do it; here for stored weights.

    Example:
        >>> from bnnft.ber import Asymmetric
        >>> model = Scrambled(Asymmetric(rate_0_to_1=0, rate_1_to_0=0.2))
        >>> model.bit_rates(), len(model.flips(torch.ones(100, 100), Key(seed=0)))  # of 10,000 ones
        ((0.1, 0.1), 1024)
    """

    model: Any  # float | ErrorModel: of such a union OmegaConf can make no config
    mask: int = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        checked_number(self.mask, "mask")
        object.__setattr__(self, "scale", checked_scale(self.scale))
        object.__setattr__(self, "model", unwrapped(self.model))
        assert self.parts  # built now, so that it raises now

    @cached_property
    def parts(self) -> tuple[ErrorModel]:
        """The errors of the memory, with the scale on their rates."""
        return (as_error_model(self.model).scaled(self.scale),)

    def check_layers(self, names: Sequence[str]) -> None:
        """Raise ValueError if the memory's errors do not fit these weights."""
        self.parts[0].check_layers(names)

    def bit_rates(self, name: str = "") -> tuple[float, float] | None:
        """Return the mean of both rates, for each stored bit."""
        rates = self.parts[0].bit_rates(name)
        return None if rates is None else (sum(rates) / 2, sum(rates) / 2)

    def flips(self, weight: Tensor, key: Key) -> Tensor:
        """Return the sorted flat indices of the bits that read wrong: those whose stored bit does."""
        (memory,) = self.parts
        if not memory.reads_bits:
            return memory.flips(weight, key)
        stored = torch.where(weight.detach().signbit(), -1.0, 1.0).reshape(-1)
        stored[self._masked(weight, key)] *= -1
        return memory.flips(stored.view(weight.shape), key)

    def _masked(self, weight: Tensor, key: Key) -> Tensor:
        place = key.position, weight.numel(), weight.device
        if place not in self._masks:
            own = Key(seed=self.mask, position=key.position, purpose="mask")
            self._masks[place] = places_below(0.5, weight.numel(), own.stream(), weight.device)
        return self._masks[place]

    @cached_property
    def _masks(self) -> dict[tuple[int, int, torch.device], Tensor]:
        return {}
