"""Follow where tensors come from: which are made of parameters, buffers and constants alone, and of which elements.

Every other tensor is made of the batch. No operations are counted, so that a weight may be used any number of times,
in batches of any size, in any thread that runs the model's modules.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnnft.tracing.arguments import replaced, tensors_in, unwrapped, write_over
from bnnft.tracing.elements import Elements, covers, elements_of, spreads, storage_of
from bnnft.tracing.mode import ModuleMode
from bnnft.tracing.operations import FORMS, GIVES_FORM, JOINING, REARRANGING, backward_of, brings, draws, writes
from bnnft.tracing.origins import CONSTANT, MAYBE, Origin, Origins, merged
from bnnft.tracing.tracking import LINEAR_MAPS

_SMALL = (torch.bool, torch.int8, torch.uint8)  # types of numbers in which bits may be kept


class _Step(NamedTuple):
    """An operation: its name, what it is given, what that is made of, whether of the batch, and what it writes to."""

    operation: str
    given: list[Tensor]
    origins: list[Origin | None]
    of_batch: bool
    targets: list[Tensor]


class Provenance(ModuleMode):
    """Follows tensors while active, in eager mode; changes nothing unless a subclass does.

    Args:
        model: whose parameters are followed.

    Attributes:
        origins: of the tensors that are not of the batch.
        constants: tensors from outside of the model that are no part of the batch.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.origins = Origins(model)
        self.constants: list[Tensor] = []

    # --- what subclasses do -------------------------------------------------------------------------------------

    def made(self, result: Tensor, operation: str, elements: Elements) -> tuple[Tensor, Any]:
        """Return what to use in place of a float tensor that was made of parameters element by element, and a mark.

        Called for each tensor without marks; ``None`` is no mark.
        """
        return result, None

    def remade(self, result: Tensor, operation: str, elements: Elements, origin: Origin) -> tuple[Tensor, Any]:
        """Return what to use in place of a float tensor that was made of such with marks, and a mark of its own."""
        return result, None

    def used(self, operand: Tensor, operation: str, first: bool, origin: Origin) -> Tensor:
        """Return what to use in place of an operand that an operation combines with the batch."""
        return operand

    def read(self, parameter: str, values: Tensor, operation: str) -> Tensor:
        """Return what to use in place of a parameter (or a view of it) that an operation reads."""
        return values

    def not_float(self, operand: Tensor) -> None:
        """Look at a mask or small integers, made of parameters, that an operation combines with the batch."""

    def entered(self) -> None:
        """Take note of parameters, constants and buffers."""
        self.origins.register()
        for constant in self.constants:
            self.origins.keep(constant, CONSTANT)

    def left(self) -> None:
        """Forget all tensors."""
        self.origins.clear()

    def _enter_module(self, name: str) -> None:
        self.origins.look_again()
        super()._enter_module(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for kind in types:
            if not issubclass(kind, Tensor):  # a tensor of another library: what it calls inside is seen then
                return self.again(kind.__torch_function__, func, types, args, kwargs)
        if (backward := backward_of(func, args, kwargs)) is not None:  # what it recomputes is seen then
            return self.again(backward)
        with torch._C.DisableTorchFunction():  # our own operations are nobody's business
            step = self._step(func, args, kwargs)
            changes = None if step is None else self._changes(step)
            memory = storage_of(step.given[0]) if step is not None and step.operation == "set" else None
        if changes:
            args, kwargs = replaced(args, changes), replaced(kwargs, changes)
        result = func(*args, **kwargs)
        if step is None:
            return result
        with torch._C.DisableTorchFunction():
            if memory is not None:
                self.origins.moved(step.given[0], memory)
            elif step.targets:
                for target in step.targets:
                    self._write(step, target)
            elif step.operation in FORMS and step.of_batch:
                self._unsure(result)
            elif not step.of_batch:
                return self._results(step, func, args, kwargs, result)
        return result

    def _step(self, func: Any, args: Any, kwargs: Any) -> _Step | None:
        """Return what is known of an operation, ``None`` if it has nothing to do with parameters or constants."""
        out = list(tensors_in((kwargs.get("out"),)))
        given = [unwrapped(tensor) for tensor in tensors_in((args, kwargs)) if not any(tensor is each for each in out)]
        name = getattr(func, "__name__", "")
        operation = name.strip("_")
        origins = self._settled(operation, given, [self.origins.of(tensor) for tensor in given])
        of_batch = any(origin is None for origin in origins)
        if of_batch and not out and operation not in FORMS and not any(origin is not None for origin in origins):
            return None
        if operation in GIVES_FORM:
            given, origins, of_batch = given[:1], origins[:1], origins[0] is None
        return _Step(operation, given, origins, of_batch, out or (given[:1] if writes(name) else []))

    def _settled(self, operation: str, given: list[Tensor], origins: list[Origin | None]) -> list[Origin | None]:
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

    def _unsure(self, result: Any) -> None:
        """Take note of what was made of nothing, if it could be combined with a parameter element by element."""
        for tensor in tensors_in((result,)):
            if any(spreads(tensor.shape, parameter.shape) for parameter in self.origins.parameters.values()):
                self.origins.keep(tensor, MAYBE if tensor.numel() > 1 else CONSTANT)

    def _changes(self, step: _Step) -> dict[int, Tensor]:
        """Return what an operation is to take in place of its operands, by their identities."""
        changes = {}
        for number, (tensor, origin) in enumerate(zip(step.given, step.origins, strict=True)):
            written = any(tensor is target for target in step.targets)
            if origin is None or written or step.operation in FORMS:
                continue
            if not tensor.is_floating_point():
                if step.of_batch and origin.parameters and tensor.dim() > 1 and tensor.dtype in _SMALL:
                    self.not_float(tensor)
                continue
            now, owner = tensor, self.origins.owner(tensor)
            if owner is not None and step.operation not in REARRANGING:
                now = self.read(owner, tensor, step.operation)
            is_used = step.of_batch or ((origin.marks or owner) and step.operation.startswith(LINEAR_MAPS))
            if is_used and (origin.marks or tensor.dim() > 1):
                now = self.used(now, step.operation, number == 0, origin)
            if now is not tensor:
                changes[id(tensor)] = now
        return changes

    def _write(self, step: _Step, target: Tensor) -> None:
        """Take note of what a write makes of its target; a parameter stays one, whatever is written to it."""
        operation, given, origins = step.operation, step.given, step.origins
        if (owner := self.origins.owner(target)) is not None:
            self.origins.written.add(owner)
            return
        others = [number for number, tensor in enumerate(given) if tensor is not target]
        is_new = (operation == "copy" or len(others) == len(given)) and covers(target)
        if is_new:  # whatever it was before
            given, origins = [given[n] for n in others], [origins[n] for n in others]
        elif len(others) == len(given):
            given, origins = [target, *given], [self.origins.of(target), *origins]
        if any(origin is None for origin in origins):
            self.origins.forget(target)
            return
        origin = merged(origins)
        if draws(operation) and not origin.parameters:
            origin = MAYBE
        found = None if is_new else self.origins.elements(target)
        found = found or elements_of(self.origins, operation, given, target, origin.parameters)
        if is_new:
            self.origins.keep(target, origin)
        self.origins.change(target, origin)
        self.origins.view(target, found)
        if found is not None:
            now, mark = self._made(target, operation, found, origin)
            write_over(target, now)
            if mark is not None:
                self.origins.change(target, Origin(origin.parameters, frozenset(), frozenset([mark])))

    def _results(self, step: _Step, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        """Take note of what was made of parameters and constants alone, and let a subclass change it."""
        operation, given = step.operation, step.given
        if not given and (draws(operation) or brings(operation, out)):
            self._unsure(out)
            return out
        origin, changes = merged(step.origins), {}
        if operation in FORMS:
            origin = MAYBE if origin.unsure else CONSTANT
        companions = partial(self._rearranged, step, func, args, kwargs)
        for number, result in enumerate(tensors_in((out,))):
            tensor = unwrapped(result)
            if any(tensor is other for other in given):
                continue
            if operation == "get" and storage_of(tensor) != storage_of(given[0]):
                continue  # a gradient
            is_view = self.origins.owner(tensor) is not None
            if not any(storage_of(tensor) == storage_of(other) for other in given):
                self.origins.keep(tensor, origin)
            if operation in FORMS:
                continue
            found = elements_of(self.origins, operation, given, tensor, origin.parameters, companions, number)
            if found is None:
                continue
            self.origins.view(tensor, found)
            if is_view or not tensor.is_floating_point():
                continue
            now, mark = self._made(tensor, operation, found, origin)
            if tensor is not result:  # nothing can be put in the place of a wrapped tensor
                now = write_over(tensor, now)
            elif now is not tensor:
                changes[id(tensor)] = now
            if mark is not None:
                self.origins.keep(now, Origin(origin.parameters, frozenset(), frozenset([mark])), found)
        return replaced(out, changes) if changes else out

    def _made(self, result: Tensor, operation: str, elements: Elements, origin: Origin) -> tuple[Tensor, Any]:
        if origin.marks:
            return self.remade(result, operation, elements, origin)
        return self.made(result, operation, elements)

    def _rearranged(self, step: _Step, func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        """Return what a rearranging operation makes of the places of the elements, a tensor for each result."""
        joins, places = step.operation in JOINING, {}
        for number, tensor in enumerate(step.given):
            elements = self.origins.elements(tensor)
            if elements is not None and (joins or number == 0):
                places[id(tensor)] = elements.places(self.origins, tensor.shape, tensor.device)
            elif joins:
                places[id(tensor)] = torch.full_like(tensor, -1, dtype=torch.int64)
        return list(tensors_in((func(*replaced(args, places), **replaced(kwargs, places)),)))
