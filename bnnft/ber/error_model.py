"""What every error model is, and how it reads stored bits."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from bnnft.ber.random_bits import Key

if TYPE_CHECKING:
    default = property
else:

    class default:  # noqa: N801
        """A property of instances that a subclass may replace by a class attribute, a property or a dataclass field.

        The class itself has nothing of its name: a dataclass takes what a base class has there for the default of a
        field, and a field without a default is to stay required.
        """

        def __init__(self, get: Callable[[Any], Any]) -> None:
            self._get, self.__doc__ = get, get.__doc__

        def __get__(self, model: Any, kind: type) -> Any:
            if model is None:
                raise AttributeError(self._get.__name__)
            return self._get(model)


class ErrorModel(ABC):
    """Says which stored bits of a weight read wrong.

    A subclass has one method to write, :meth:`flips`; everything else has a default. Its parameters are the arguments
    of its constructor, each kept in an attribute of its name, as a frozen dataclass does: ``conf/ber/NAME.yaml`` sets
    them, and a curve goes over one of them.

    Example:
        >>> import torch
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class EveryOther(ErrorModel):
        ...     step: int = 2
        ...     axis, points = "step", (1000, 100, 10)
        ...     def flips(self, weight, key):
        ...         return torch.arange(0, weight.numel(), self.step, device=weight.device)
        >>> EveryOther(step=4).flips(torch.zeros(2, 5), Key()), EveryOther(step=4).at("step", 10)
        (tensor([0, 4, 8]), EveryOther(step=10))
    """

    @abstractmethod
    def flips(self, weight: Tensor, key: Key) -> Tensor:
        """Return the sorted, distinct flat indices (int64, on the weight's device) of the bits that read wrong.

        Args:
            weight: the latent weight, any shape; its sign bits are the stored bits, bit 1 is weight +1.
            key: names the stream of random bits for this weight and this draw.
        """

    @default
    def reads_bits(self) -> bool:
        """Whether the flips may depend on the stored bits.

        Where they do not, they are drawn before the forward that they go into, also where only this forward makes the
        bits.
        """
        return True

    @default
    def rate(self) -> float | None:
        """The share of bits that read wrong where as many ones as zeros are stored, ``None`` where none is known.

        For stuck cells it is the share of failing cells, of which those show that hold another bit.
        """
        return None

    @default
    def source(self) -> str:
        """Where the figures are published, said once at the start of a run; empty where none are."""
        return ""

    @default
    def axis(self) -> str:
        """The parameter that a curve goes over unless another one is asked for."""
        return "rate"

    @default
    def points(self) -> Sequence[float]:
        """The values of :attr:`axis` in a curve unless others are asked for, from the fewest errors to the most."""
        return 0, 0.01, 0.05, 0.1, 0.15, 0.2, 0.3

    def check_layers(self, names: Sequence[str]) -> None:  # noqa: B027 (a default, not forgotten)
        """Raise ValueError if errors that differ by layer do not fit the weights of these qualified names."""

    def bit_rates(self, name: str = "") -> tuple[float, float] | None:
        """Return the probabilities that a stored 0 and a stored 1 read wrong, means over draws and dies.

        They say what errors make of a weight on average, ``-1 + 2 p01`` and ``1 - 2 p10``: what compensation and
        prediction need.

        Args:
            name: the weight's qualified name, for errors that differ by layer.

        Returns:
            Fractions in [0, 1], or ``None`` where they are not known.

        Example:
            >>> from bnnft.ber import Asymmetric, Sequence
            >>> Asymmetric(0, 0.2).bit_rates(), Sequence([0.5, Asymmetric(0, 0.2)]).bit_rates()
            ((0.0, 0.2), (0.4, 0.6))
        """
        return None

    def at(self, axis: str, value: float) -> "ErrorModel":
        """Return the same errors with another value of one parameter.

        Args:
            axis: the parameter, or ``"rate"`` for all errors that have a rate, if only the mean of several.
            value: to take its place.

        Raises:
            TypeError: there is no rate to set.
            ValueError: there is no such parameter, or it can't have this value.
        """
        if axis == "rate":
            return self.at_rate(value)
        if axis not in signature(type(self)).parameters:
            raise ValueError(f"axis must name a parameter of the error model {self!r}, got {axis!r}")
        return self._with(axis, value)

    def at_rate(self, rate: float) -> "ErrorModel":
        """Return the same errors at another rate.

        Raises:
            TypeError: there is no rate to set.
            ValueError: they can't have this rate.

        Example:
            >>> from bnnft.ber import Asymmetric
            >>> Asymmetric(rate_0_to_1=0.02, rate_1_to_0=0.01).at_rate(0.03)
            Asymmetric(rate_0_to_1=0.04, rate_1_to_0=0.02)
        """
        if "rate" not in signature(type(self)).parameters:
            raise self._no_rate()
        return self._with("rate", rate)

    def scaled(self, factor: float) -> "ErrorModel":
        """Return the same errors at a multiple of their rate.

        Raises:
            TypeError, ValueError: as :meth:`at_rate`.

        Example:
            >>> from bnnft.ber import Independent
            >>> Independent(0.1).scaled(0.5)
            Independent(rate=0.05)
        """
        if factor == 1:
            return self
        if self.rate is None:
            raise self._no_rate()
        return self.at_rate(factor * self.rate)

    def _with(self, parameter: str, value: Any) -> Self:
        own = {name: getattr(self, name) for name in signature(type(self)).parameters}
        return type(self)(**{**own, parameter: value})

    def _no_rate(self) -> TypeError:
        return TypeError(f"{self!r} has no rate to set: it needs a field `rate` or a method `at_rate`")

    def __repr__(self) -> str:
        own = (f"{name}={getattr(self, name)!r}" for name in signature(type(self)).parameters)
        return f"{type(self).__name__}({', '.join(own)})"


def stored_ones(weight: Tensor, places: Tensor) -> Tensor:
    """Return for flat indices of a weight whether its stored bit is 1 there (weight +1), as bool.

    Example:
        >>> import torch
        >>> stored_ones(torch.tensor([0.5, -0.5, -0.0]), torch.tensor([0, 2]))
        tensor([ True, False])
    """
    return weight.detach().reshape(-1).index_select(0, places).signbit().logical_not_()
