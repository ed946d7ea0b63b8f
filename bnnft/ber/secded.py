"""Words with check bits that correct one error."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bnnft.ber.asymmetric import Asymmetric
from bnnft.ber.checks import checked_scale
from bnnft.ber.chip import Chip
from bnnft.ber.composition import Composition
from bnnft.ber.conversion import as_error_model, unwrapped
from bnnft.ber.error_model import ErrorModel
from bnnft.ber.independent import Independent
from bnnft.ber.random_bits import Key


@dataclass(frozen=True)
class Secded(Composition):
    """Bits lie in words with check bits of an extended Hamming code: one error in a word is corrected, two stay.

    Check bits lie in the same memory, have errors as all bits, and count as such. A decoder that corrects wrongly, as
    real ones may with three errors or more, is not modelled: the errors of a word stay what they are.

    Args:
        model: of the memory: a rate or an error model.
        word: bits of data in a word, >= 1.
        scale: multiplies all rates, >= 0: what a curve goes over.

    Raises:
        TypeError, ValueError: an argument is out of range.

    Source: Hsiao 1970, DOI 10.1147/rd.144.0395 (72 bits for 64), of codes after Hamming 1950.

    Example:
        >>> model = Secded(0.01, word=64)
        >>> model.check_bits, model.overhead, [round(rate, 5) for rate in model.bit_rates()]
        (8, 0.125, [0.0051, 0.0051])
    """

    model: Any  # float | ErrorModel: of such a union OmegaConf can make no config
    word: int = 64
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", checked_scale(self.scale))
        object.__setattr__(self, "model", unwrapped(self.model))
        if isinstance(self.word, bool) or not isinstance(self.word, int) or self.word < 1:
            raise ValueError(f"word must be an integer >= 1, got {self.word!r}")
        assert self.parts  # built now, so that it raises now

    @cached_property
    def parts(self) -> tuple[ErrorModel]:
        """The errors of the memory, with the scale on their rates."""
        return (as_error_model(self.model).scaled(self.scale),)

    @property
    def check_bits(self) -> int:
        """Number of check bits of a word: the least that name each place of it, and one for all."""
        places = 1
        while 2**places < self.word + places + 1:
            places += 1
        return places + 1

    @property
    def overhead(self) -> float:
        """Check bits for each bit of data."""
        return self.check_bits / self.word

    def check_layers(self, names: Sequence[str]) -> None:
        """Raise ValueError if the memory's errors do not fit these weights."""
        self.parts[0].check_layers(names)

    def bit_rates(self, name: str = "") -> tuple[float, float] | None:
        """Return the rate ``p (1 - (1 - p)^(n - 1))`` of words of ``n`` bits in all.

        It is known for independent errors of one rate; others depend on what else a word holds.
        """
        (memory,) = self.parts
        rates = memory.bit_rates(name)
        if rates is None or rates[0] != rates[1] or type(memory) not in (Independent, Chip, Asymmetric):
            return None
        rate = rates[0] * (1 - (1 - rates[0]) ** (self.word + self.check_bits - 1))
        return rate, rate

    def flips(self, weight: Tensor, key: Key) -> Tensor:
        """Return the sorted flat indices of the bits that read wrong after correction."""
        (memory,), size, width = self.parts, weight.numel(), self.word + self.check_bits
        words = -(-size // self.word)
        stored = torch.ones(words, width, device=weight.device)
        if memory.reads_bits:
            data = torch.zeros(words * self.word, device=weight.device)
            data[:size] = (~weight.detach().signbit()).reshape(-1).float()
            stored = 2 * self._encoded(data.view(words, self.word)) - 1
        wrong = memory.flips(stored, key)
        word, place = wrong // width, wrong % width
        stay = torch.bincount(word, minlength=words)[word] > 1
        flips = word * self.word + place
        return flips[stay & (place < self.word) & (flips < size)]

    def _encoded(self, data: Tensor) -> Tensor:
        """Return words of zeros and ones with check bits behind: a parity of each digit of places, and one of all."""
        count = self.check_bits - 1
        # data lie at the places whose numbers are no powers of two
        places = [place for place in range(1, self.word + count + 1) if place & (place - 1)]
        digits = torch.tensor([[place >> digit & 1 for digit in range(count)] for place in places], device=data.device)
        word = torch.cat([data, (data @ digits.to(data)) % 2], 1)
        return torch.cat([word, word.sum(1, keepdim=True) % 2], 1)
