"""Parameters that may hold stored bits and may not: what to do until that shows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from bnnft.injection.finder import Finder
from bnnft.injection.sites import Site
from bnnft.tracing.binary import two_values

_PATIENCE = 10  # batches for which a parameter may stay as it is before it counts as bits


class Undecided:
    """Parameters that hold two values when they are first seen, as binary weights do and as some float layers start.

    They wait: for an update that leaves them with the same two values, or for ten batches without any change (one, if
    the values are -1 and +1). Then they are bits. Anything else makes floats of them.

    Args:
        finder: that has seen them.
        say: is given what is said once of the run.
    """

    def __init__(self, finder: Finder, say: Callable[[str], Any]) -> None:
        self._finder, self._say = finder, say
        self._waiting: dict[str, tuple[Tensor, int]] = {}  # values, and since which batch
        self._decided: set[str] = set()

    def __contains__(self, name: object) -> bool:
        return name in self._waiting

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def take(self, known: set[str], batch: int) -> None:
        """Let those that the finder has seen since wait."""
        for name, use in self._finder.findings.uses.items():
            weight = self._finder.origins.parameters[name]
            settled = name in known or use.written or name in self._decided or not weight.requires_grad
            if use.stored and not settled and name not in self._waiting:
                self._waiting[name] = weight.detach().clone(), batch
                self._say(
                    f"{name} holds two values, as binary weights do and as some float layers do at the start: it has "
                    "flips as soon as an update leaves it so"
                )

    def decide(self, batch: int) -> bool:
        """Decide about those that waited long enough; return whether some turned out to be bits."""
        found = False
        for name, (values, since) in list(self._waiting.items()):
            weight = self._finder.origins.parameters[name].detach()
            changed = not torch.equal(weight, values)
            patience = 1 if bool((values.abs() == 1).all()) else _PATIENCE
            if not changed and batch - since < patience:
                continue
            del self._waiting[name]
            if changed and not _same_values(weight, values):
                del self._finder.findings.uses[name]
                self._finder.findings.floats.add(name)
            else:
                self._decided.add(name)
                found = True
        return found


def _same_values(weight: Tensor, before: Tensor) -> bool:
    """Return whether a weight has the two values that it had before, whichever of its elements have which."""
    now, then = two_values(weight), two_values(before)
    if now is None or then is None or now.half.shape != then.half.shape:
        return False
    return torch.allclose(now.half, then.half, rtol=1e-3) and torch.allclose(now.middle, then.middle, atol=1e-3)


def unsettled(model: nn.Module, sites: list[Site], finder: Finder) -> bool:
    """Return whether a model has weights that nobody has seen yet, or that code of the user's may binarize later."""
    known = {id(site.weight) for site in sites}
    return any(
        parameter.dim() > 1 and id(parameter) not in known and not (name in finder.findings.floats and plain)
        for name, parameter, plain in _weights(model)
    )


def _weights(model: nn.Module) -> list[tuple[str, nn.Parameter, bool]]:
    """Return names and parameters of a model, and whether each is in a layer of torch's own, which binarizes none."""
    found = []
    for prefix, module in model.named_modules():
        plain = type(module).__module__.startswith("torch.nn.") and not isinstance(module, ParametrizationList)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and not nn.parameter.is_lazy(parameter):
                found.append((f"{prefix}.{name}" if prefix else name, parameter, plain))
    return found
