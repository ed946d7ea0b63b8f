"""Follow where tensors come from: which are made of parameters, buffers and constants alone, and of which elements.

Every other tensor is made of the batch. No operations are counted, so that a weight may be used any number of times,
in batches of any size, in any thread that runs the model's modules.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bnnft.tracing.arguments import replaced, tensors_in, write_over
from bnnft.tracing.elements import Elements, elements_of, storage_of
from bnnft.tracing.mode import ModuleMode
from bnnft.tracing.operations import FORMS, OF_AUTOGRAD, REARRANGING, backward_of, brings, draws
from bnnft.tracing.origins import CONSTANT, MAYBE, Origin, Origins, merged
from bnnft.tracing.steps import Step, step_of
from bnnft.tracing.tracking import LINEAR_MAPS

_SMALL = (torch.bool, torch.int8, torch.uint8)  # types of numbers in which bits may be kept


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

    def made(self, result: Tensor, step: Step, elements: Elements, origin: Origin) -> tuple[Tensor, Any]:
        """Return what to use in place of a float tensor that was made of parameters element by element, and a mark.

        ``None`` is no mark; what was made of marked tensors then keeps theirs.
        """
        return result, None

    def used(self, operand: Tensor, operation: str, first: bool, origin: Origin) -> Tensor:
        """Return what to use in place of an operand that an operation combines with the batch."""
        return operand

    def taken(self, operand: Tensor) -> Tensor:
        """Return what to use in place of a marked tensor that an operation takes."""
        return operand

    def read(self, parameter: str, values: Tensor, operation: str) -> Tensor:
        """Return what to use in place of a parameter (or a view of it) that an operation reads."""
        return values

    def not_float(self, operand: Tensor) -> None:
        """Look at a mask or small integers, made of parameters, that an operation combines with the batch."""

    def entered(self) -> None:
        """Take note of parameters, constants and buffers."""
        self.origins.register(self.constants)

    def left(self) -> None:
        """Forget all tensors."""
        self.origins.clear()

    def _enter_module(self, name: str, *args: Any) -> None:
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
            step = step_of(self.origins, func, args, kwargs)
            changes, memory = (None, None) if step is None else (self._changes(step), step.memory)
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
                self.origins.keep_unsure(tensors_in((result,)))
            elif not step.of_batch:
                return self._results(step, func, args, kwargs, result)
        return result

    def _changes(self, step: Step) -> dict[int, Tensor]:
        """Return what an operation is to take in place of its operands, by their identities."""
        changes = {}
        for number, tensor, origin in step.operands():
            if not tensor.is_floating_point():
                if step.of_batch and origin.parameters and tensor.dim() > 1 and tensor.dtype in _SMALL:
                    self.not_float(tensor)
                continue
            takes = origin.marks and step.operation not in OF_AUTOGRAD
            now, owner = self.taken(tensor) if takes else tensor, self.origins.owner(tensor)
            if owner is not None and step.operation not in REARRANGING:
                now = self.read(owner, tensor, step.operation)
            is_used = step.of_batch or ((origin.marks or owner) and step.operation.startswith(LINEAR_MAPS))
            if is_used and (origin.marks or tensor.dim() > 1 or owner):
                now = self.used(now, step.operation, number == 0, origin)
            if now is not tensor:
                changes[id(tensor)] = now
        return changes

    def _write(self, step: Step, target: Tensor) -> None:
        """Take note of what a write makes of its target; a parameter stays one, whatever is written to it."""
        if (owner := self.origins.owner(target)) is not None:
            self.origins.written.add(owner)
            return
        given, origins, is_new = step.mixed_into(target, self.origins)
        if any(origin is None for origin in origins):
            self.origins.forget(target)
            return
        origin = merged(origins)
        if draws(step.operation) and not origin.parameters:
            origin = MAYBE
        found = None if is_new else self.origins.elements(target)
        found = found or elements_of(self.origins, step.operation, given, target, origin.parameters)
        if is_new:
            self.origins.keep(target, origin)
        self.origins.change(target, origin)
        self.origins.view(target, found)
        if found is not None:
            now, mark = self.made(target, step, found, origin)
            write_over(target, now)
            if mark is not None:
                self.origins.change(target, Origin(origin.parameters, frozenset(), frozenset([mark])))

    def _results(self, step: Step, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        """Take note of what was made of parameters and constants alone, and let a subclass change it."""
        operation, given = step.operation, step.given
        if not given and (draws(operation) or brings(operation, out)):
            self.origins.keep_unsure(tensors_in((out,)))
            return out
        origin, changes = merged(step.origins), {}
        if operation in FORMS:
            origin = MAYBE if origin.unsure else CONSTANT
        companions = partial(step.rearranged, self.origins, func, args, kwargs)
        for number, result, tensor in step.results(out):
            if not any(storage_of(tensor) == storage_of(other) for other in given):
                self.origins.keep(tensor, origin)
            if operation in FORMS:
                continue
            found = elements_of(self.origins, operation, given, tensor, origin.parameters, companions, number)
            if found is None:
                continue
            self.origins.view(tensor, found)
            if self.origins.owner(tensor) is not None or not tensor.is_floating_point():
                continue
            now, mark = self.made(tensor, step, found, origin)
            if tensor is not result:  # nothing can be put in the place of a wrapped tensor
                now = write_over(tensor, now)
            elif now is not tensor:
                changes[id(tensor)] = now
            if mark is not None:
                self.origins.keep(now, Origin(origin.parameters, frozenset(), frozenset([mark])), found)
        return replaced(out, changes) if changes else out
