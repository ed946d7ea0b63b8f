"""Clean state dicts, copies and pickles of a module, also while bits of its latent weights are flipped."""

import copy
from functools import partial
from typing import Any

from torch import Tensor, nn

from bnnft.injection.latent_weight import LatentWeight
from bnnft.injection.sites import Site

# by the identity of the parameter, as long as any context may flip bits of it
_held: dict[int, LatentWeight] = {}
_COPIED, _PICKLED = "__deepcopy__", "__reduce_ex__"


def hold(site: Site, user: object) -> LatentWeight:
    """Return the one latent weight of a site; from now on copies and pickles of the parameter are clean.

    Args:
        site: of the parameter.
        user: who is to :func:`release` it.
    """
    latent = _held.get(id(site.weight)) or LatentWeight(site)
    latent.users.add(user)
    _held[id(site.weight)] = latent
    _cover(latent)
    return latent


def release(site: Site, user: object) -> None:
    """Leave the parameter as it was if nobody else holds it; more calls do nothing."""
    latent = _held.get(id(site.weight))
    if latent is not None:
        latent.users.discard(user)
        if not latent.users:
            _uncover(latent)
            del _held[id(site.weight)]


def clean_state(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Put clean copies of the module's own weights into its state dict; a hook of state dicts."""
    for name, weight in module._parameters.items():
        latent, value = _held.get(id(weight)), state_dict.get(prefix + name)
        if latent is None or not latent.flipped or not isinstance(value, Tensor) or value.shape != latent.weight.shape:
            continue
        clean = latent.clean_copy().to(device=value.device, dtype=value.dtype)
        kept = isinstance(value, nn.Parameter)  # with keep_vars=True
        state_dict[prefix + name] = nn.Parameter(clean, value.requires_grad) if kept else clean


def _cover(latent: LatentWeight) -> None:
    vars(latent.weight)[_COPIED] = partial(_copied, latent)
    vars(latent.weight)[_PICKLED] = partial(_pickled, latent)


def _uncover(latent: LatentWeight) -> None:
    vars(latent.weight).pop(_COPIED, None)
    vars(latent.weight).pop(_PICKLED, None)


def _copied(latent: LatentWeight, memo: dict[int, Any]) -> Tensor:
    """Return what a deep copy of the parameter is, without its flips."""
    _uncover(latent)
    try:
        result: Tensor = copy.deepcopy(latent.weight, memo)
    finally:
        _cover(latent)
    latent.clean(result)
    return result


def _pickled(latent: LatentWeight, protocol: int) -> Any:
    """Return what a pickle of the parameter holds, without its flips."""
    clean = _copied(latent, {})
    vars(clean).update({name: value for name, value in vars(latent.weight).items() if name not in (_COPIED, _PICKLED)})
    return clean.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]
