"""Weights of which each process holds a part: as distributed tensors (FSDP2, tensor parallelism), or flattened."""

from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(weight: Tensor) -> bool:
    """Return whether a weight is a distributed tensor."""
    return hasattr(weight, "to_local")


def flattened_by(model: nn.Module) -> str | None:
    """Return what has put the weights of a model together into flat shards, if anything has."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        return "FSDP1 (FullyShardedDataParallel)"
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        return "DeepSpeed ZeRO-3"
    return None


def exchanges_parameters(model: nn.Module) -> bool:
    """Return whether the parameters of a model are exchanged for whole ones while it runs: FSDP1, FSDP2, DeepSpeed."""
    return flattened_by(model) is not None or any(hasattr(module, "reshard") for module in model.modules())


def whole(weight: Tensor) -> Tensor:
    """Return all values of a weight, detached; of a sharded one every process must ask."""
    values: Any = weight.detach()
    full: Tensor = values.full_tensor() if is_sharded(weight) else values
    return full


def local_part(weight: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return what this process holds of a weight, and which of the flat indices lie in it, as indices of the part."""
    if not is_sharded(weight):
        return weight, indices
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(weight, DTensor)
    with torch.no_grad():  # then it is the part itself and no copy in a graph
        part = weight.to_local()
    shape, start = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    places, inside, stride = torch.zeros_like(indices), torch.ones_like(indices, dtype=torch.bool), 1
    for size, own, first in reversed(list(zip(weight.shape, shape, start, strict=True))):
        place = indices % size - first
        inside &= (place >= 0) & (place < own)
        places, stride, indices = places + place * stride, stride * own, indices.div(size, rounding_mode="floor")
    return part, places[inside]
