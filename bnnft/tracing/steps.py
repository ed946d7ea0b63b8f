"""An operation as it is seen: what it is given, and what that is made of."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnnft.tracing.arguments import replaced, tensors_in, unwrapped
from bnnft.tracing.elements import covers, spreads, storage_of
from bnnft.tracing.operations import FORMS, GIVES_FORM, JOINING, writes
from bnnft.tracing.origins import CONSTANT, Origin, Origins
from bnnft.tracing.tracking import LINEAR_MAPS


class Step(NamedTuple):
    """An operation: its name, what it is given, what that is made of, whether of the batch, and what it writes to."""

    operation: str
    given: list[Tensor]
    origins: list[Origin | None]
    of_batch: bool
    targets: list[Tensor]

    def rearranged(self, origins: Origins, func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        """Return what a rearranging operation makes of the places of the elements, a tensor for each result."""
        joins, places = self.operation in JOINING, {}
        for number, tensor in enumerate(self.given):
            elements = origins.elements(tensor)
            if elements is not None and (joins or number == 0):
                places[id(tensor)] = elements.places(origins, tensor.shape, tensor.device)
            elif joins:
                places[id(tensor)] = torch.full_like(tensor, -1, dtype=torch.int64)
        return list(tensors_in((func(*replaced(args, places), **replaced(kwargs, places)),)))

    @property
    def memory(self) -> int | None:
        """What identifies the memory of a tensor that is to lie in another one."""
        return storage_of(self.given[0]) if self.operation == "set" else None

    def operands(self) -> Iterator[tuple[int, Tensor, Origin]]:
        """Yield what an operation computes with that is not of the batch: number, tensor and origin."""
        for number, (tensor, origin) in enumerate(zip(self.given, self.origins, strict=True)):
            written = any(tensor is target for target in self.targets)
            if origin is not None and not written and self.operation not in FORMS:
                yield number, tensor, origin

    def mixed_into(self, target: Tensor, origins: Origins) -> tuple[list[Tensor], list[Origin | None], bool]:
        """Return what a target consists of after it was written to, the origins of these, and whether all is new."""
        others = [number for number, tensor in enumerate(self.given) if tensor is not target]
        is_outside = len(others) == len(self.given)
        if (self.operation == "copy" or is_outside) and covers(target):  # whatever it was before
            return [self.given[n] for n in others], [self.origins[n] for n in others], True
        if is_outside:
            return [target, *self.given], [origins.of(target), *self.origins], False
        return self.given, self.origins, False

    def results(self, out: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the tensors that an operation made, not returned as given: number, as returned, and unwrapped."""
        for number, result in enumerate(tensors_in((out,))):
            tensor = unwrapped(result)
            is_gradient = self.operation == "get" and storage_of(tensor) != storage_of(self.given[0])
            if not is_gradient and not any(tensor is other for other in self.given):
                yield number, result, tensor


def step_of(origins: Origins, func: Any, args: Any, kwargs: Any) -> Step | None:
    """Return what is known of an operation, ``None`` if it has nothing to do with parameters or constants."""
    out = list(tensors_in((kwargs.get("out"),)))
    given = [unwrapped(tensor) for tensor in tensors_in((args, kwargs)) if not any(tensor is each for each in out)]
    name = getattr(func, "__name__", "")
    operation = name.strip("_")
    known = _settled(operation, given, [origins.of(tensor) for tensor in given])
    of_batch = any(origin is None for origin in known)
    if of_batch and not out and operation not in FORMS and not any(origin is not None for origin in known):
        return None
    if operation in GIVES_FORM:
        given, known, of_batch = given[:1], known[:1], known[0] is None
    return Step(operation, given, known, of_batch, out or (given[:1] if writes(name) else []))


def _settled(operation: str, given: list[Tensor], origins: list[Origin | None]) -> list[Origin | None]:
    """Decide about what may be of the batch, where it meets what is made of parameters.

    It is a constant if it has the shape of these, as random numbers that they are compared with, and if it is one
    number.
    """
    shapes = [t.shape for t, origin in zip(given, origins, strict=True) if origin is not None and origin.parameters]
    if not shapes and all(origin is not None for origin in origins):
        return origins
    is_map, settled = operation.startswith(LINEAR_MAPS), []
    for tensor, origin in zip(given, origins, strict=True):
        if origin is None and shapes and tensor.dim() == 0:
            origin = CONSTANT
        elif origin is not None and origin.unsure:
            origin = CONSTANT if not is_map and any(spreads(tensor.shape, shape) for shape in shapes) else None
        settled.append(origin)
    return settled
