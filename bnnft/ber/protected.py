"""Some of the bits lie in cells that do not fail."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnnft.ber.checks import checked_number, checked_rate, checked_scale
from bnnft.ber.composition import Composition
from bnnft.ber.conversion import as_error_model, unwrapped
from bnnft.ber.error_model import ErrorModel
from bnnft.ber.per_layer import matches
from bnnft.ber.random_bits import Key, places_below


@dataclass(frozen=True)
class Protected(Composition):
    """A share of the bits of each weight is always right; the others have the errors of a memory.

    Which bits these are: at random, the same in every draw; or whole neurons by their scores, the highest first, as
    :func:`bnnft.protection_scores` makes them from importance or margins. Layers are chosen by patterns. The overhead
    is ``share`` of the bits in these layers, which need cells of another kind.

    Args:
        model: of the memory: a rate or an error model.
        share: of the bits of a weight that are right, a fraction in [0, 1].
        layers: patterns of the names of weights or layers that are protected; all if ``None``.
        scores: for each weight's name one number a neuron, or a file that ``torch.save`` wrote of that; a weight
            without scores is protected at random.
        selection: number of the random selection, >= 0.
        scale: multiplies all rates, >= 0: what a curve goes over.

    Raises:
        TypeError, ValueError: an argument is out of range; when flips are drawn, scores of another number than neurons,
            or a pattern matches no weight.

    Example:
        >>> model = Protected(0.1, share=0.5)
        >>> model.bit_rates("fc1.weight"), len(model.flips(torch.ones(100, 100), Key(seed=0)))
        ((0.05, 0.05), 497)
    """

    model: Any  # float | ErrorModel: of such a union OmegaConf can make no config
    share: float = 0.5
    layers: Sequence[str] | None = None
    scores: Any = None
    selection: int = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", checked_rate(self.share, "share"))
        object.__setattr__(self, "scale", checked_scale(self.scale))
        object.__setattr__(self, "model", unwrapped(self.model))
        checked_number(self.selection, "selection")
        if isinstance(self.layers, str):
            raise TypeError(f"layers must be a list of patterns, got the string {self.layers!r}")
        object.__setattr__(self, "layers", None if self.layers is None else tuple(self.layers))
        if not (self.scores is None or isinstance(self.scores, str | Path | Mapping)):
            raise TypeError(f"scores must map names of weights to numbers, or name a file, got {self.scores!r}")
        assert self.parts  # built now, so that it raises now

    @cached_property
    def parts(self) -> tuple[ErrorModel]:
        """The errors of the memory, with the scale on their rates."""
        return (as_error_model(self.model).scaled(self.scale),)

    def check_layers(self, names: Sequence[str]) -> None:
        """Raise ValueError if a pattern matches none of these weights, or the memory's errors do not fit them."""
        for pattern in self.layers or ():
            if not any(matches(name, pattern) for name in names):
                raise ValueError(f"layers: the pattern {pattern!r} matches no weight; there are {', '.join(names)}")
        self.parts[0].check_layers(names)

    def bit_rates(self, name: str = "") -> tuple[float, float] | None:
        """Return the rates over all bits; ``None`` where whole neurons are right, so that rates differ by neuron."""
        rates, share = self.parts[0].bit_rates(name), self.share if self._covers(name) else 0.0
        if rates is None or (name in self._scores and 0 < share < 1):
            return None
        return rates[0] * (1 - share), rates[1] * (1 - share)

    def flips(self, weight: Tensor, key: Key) -> Tensor:
        """Return the sorted flat indices of the bits that read wrong, which are none of the protected ones."""
        flips = self.parts[0].flips(weight, key)
        if not self._covers(key.name) or self.share == 0:
            return flips
        return flips[~self._protected(weight, key)[flips]]

    def _covers(self, name: str) -> bool:
        return self.layers is None or any(matches(name, pattern) for pattern in self.layers)

    @cached_property
    def _scores(self) -> Mapping[str, Any]:
        if self.scores is None or isinstance(self.scores, Mapping):
            return self.scores or {}
        loaded: Mapping[str, Any] = torch.load(self.scores, weights_only=True)
        return loaded

    def _protected(self, weight: Tensor, key: Key) -> Tensor:
        """Return for each bit of a weight whether it is protected."""
        place = key.position, key.name, weight.numel(), weight.device
        if place not in self._kept:
            bits = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
            if key.name in self._scores:
                scores = torch.as_tensor(self._scores[key.name])
                if scores.shape != weight.shape[:1]:
                    raise ValueError(
                        f"scores of {key.name!r} must be one for each of its {len(weight)} neurons, got shape "
                        f"{tuple(scores.shape)}"
                    )
                chosen = scores.argsort(descending=True, stable=True)[: round(self.share * len(scores))]
                bits.view(len(scores), -1)[chosen.to(bits.device)] = True
            else:
                own = Key(seed=self.selection, position=key.position, purpose="protect")
                bits[places_below(self.share, weight.numel(), own.stream(), weight.device)] = True
            self._kept[place] = bits
        return self._kept[place]

    @cached_property
    def _kept(self) -> dict[tuple[int, str, int, torch.device], Tensor]:
        return {}
