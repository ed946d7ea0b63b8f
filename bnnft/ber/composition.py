"""What error models that are made of others share."""

from abc import abstractmethod
from collections.abc import Collection, Sequence

from bnnft.ber.error_model import ErrorModel

_SCALES = (0, 0.25, 0.5, 1, 1.5, 2, 3)


class Composition(ErrorModel):
    """Errors of several kinds, whose rates one parameter ``scale`` multiplies.

    Attributes:
        scale: multiplies all rates, >= 0: what a curve over the rate of all of them together goes over.
    """

    scale: float
    axis = "scale"

    @property
    @abstractmethod
    def parts(self) -> Collection[ErrorModel]:
        """The error models, with the scale on their rates."""

    @property
    def points(self) -> Sequence[float]:
        """Scales from no errors to three times as many, as far as every rate can be scaled so."""
        return [scale for scale in _SCALES if self._reaches(scale)]

    def _reaches(self, scale: float) -> bool:
        try:
            self.at("scale", scale)
        except (TypeError, ValueError):
            return False
        return True

    @property
    def reads_bits(self) -> bool:
        """Whether the flips may depend on the stored bits."""
        return any(part.reads_bits for part in self.parts)

    @property
    def source(self) -> str:
        """Where the figures of its error models are published, each source once."""
        return "; ".join(dict.fromkeys(part.source for part in self.parts if part.source))

    def scaled(self, factor: float) -> ErrorModel:
        """Return the same errors at a multiple of all their rates.

        Raises:
            TypeError, ValueError: one of them has no rate, or can't have this one.
        """
        return self if factor == 1 else self.at("scale", factor * self.scale)
