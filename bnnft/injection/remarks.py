"""What there is to say of the flips of a run, each thing once."""

from collections.abc import Callable, Sequence
from typing import Any

from bnnft.ber import ErrorModel
from bnnft.injection.finder import Finder
from bnnft.injection.sites import Site


class Remarks:
    """Says where flips go, and what is binary and has none.

    Args:
        say, warn: are given sentences.
    """

    def __init__(self, say: Callable[[str], Any], warn: Callable[[str], Any]) -> None:
        self._say, self._warn = say, warn
        self._said: set[Any] = set()

    def on_sites(self, sites: Sequence[Site], errors: ErrorModel) -> None:
        """Say where the flips of sites go, and how these are known."""
        new = [site for site in sites if (site.name, site.where) not in self._said]
        self._said.update((site.name, site.where) for site in new)
        if new:
            bits = sum(site.weight.numel() for site in new)
            names = ", ".join(f"{site.name} ({'known' if site.known else 'found'}, {site.where})" for site in new)
            self._say(f"BitFlipTraining: {errors} on {bits:,} bits in {names}")

    def on_the_rest(self, finder: Finder) -> None:
        """Say what is binary, or may be, and has no flips."""
        biases = [name for name in finder.findings.biases_left() if name not in self._said]
        if biases:
            self._said.update(biases)
            self._say(f"BitFlipTraining leaves binary biases alone: {', '.join(biases)}; biases=True flips them")
        for sentence in without_flips(finder, self._said):
            self._warn(f"BitFlipTraining: {sentence}")


def without_flips(finder: Finder, said: set[Any] | None = None) -> list[str]:
    """Return in sentences what has no flips though it is binary, or may be.

    Args:
        finder: that has watched.
        said: what was said before, and is not said again; it grows.
    """
    if finder.findings.is_selective:  # others were left out by name
        return []
    said = set() if said is None else said
    strangers = [stranger for stranger in finder.findings.strangers if stranger not in said]
    unseen = finder.findings.reads - finder.findings.followed
    unseen = {name for name in unseen - said if finder.origins.parameters[name].dim() > 1}
    said.update(strangers, unseen)
    sentences = []
    if strangers:
        where = ", ".join(f"{module or 'the model'} {shape}" for module, shape in strangers)
        sentences.append(
            f"binary operands that are not the bits of one parameter have no flips: {where}. They are constants, masks "
            "or integers, sums of several bits, bits that floats of the same parameter scale, made of several "
            "parameters, or kept from an earlier forward"
        )
    if unseen:
        names = ", ".join(sorted(unseen))
        sentences.append(f"no flips in {names}: how the batch is combined with it can't be followed")
    return sentences
