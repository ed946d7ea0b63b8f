"""Whether latent weights came back from a batch that flipped their signs."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from bnnft.injection.operand import Drawn
from bnnft.injection.sites import Site
from bnnft.tracing.sharding import whole

_FEW = 20  # bits of which more than half may change sign in an update, by chance


class Restored:
    """Checks that latents came back from a watched batch, but for the few that an update may change."""

    def __init__(self) -> None:
        self._expected: list[_DrawnBits] = []

    def expect(self, sites: Iterable[Site], flips: Mapping[str, Drawn]) -> None:
        """Take note of the signs of sites that are about to be flipped in their latents."""
        self._expected = [_DrawnBits(site, flips[site.name]) for site in sites if site.where == "latent"]

    def faults(self) -> dict[str, str]:
        """Return what is wrong by the names of sites whose latents did not come back, each once."""
        why = "the flipped signs stand although they were restored, something saves them and writes them back"
        kept = [bits.name for bits in self._expected if bits.stand_flipped()]
        self._expected = []
        return {name: f"{name}: {why}" for name in kept}


class _DrawnBits:
    """Signs of a latent weight at the bits that are drawn, before they are flipped.

    Args:
        site: flipped in its latent.
        flips: flat indices of the drawn bits.
    """

    def __init__(self, site: Site, flips: Drawn) -> None:
        assert isinstance(flips, Tensor)
        self.name, self._weight, self._places = site.name, site.weight, flips
        self._clean = self._signs()

    def stand_flipped(self) -> bool:
        """Return whether most of them, and not few by chance, have changed since."""
        return len(self._places) >= _FEW and float((self._signs() != self._clean).float().mean()) > 0.5

    def _signs(self) -> Tensor:
        return whole(self._weight).reshape(-1)[self._places].signbit()
