"""Follow where tensors come from: which are made of parameters, buffers and constants alone, and of which elements.

Every other tensor is made of the batch. No operations are counted, so that a weight may be used any number of times,
in batches of any size, in any thread that runs the model's modules.
"""

import threading
from contextlib import ExitStack
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from bnnft.tracing.arguments import replaced, tensors_in, unwrapped
from bnnft.tracing.compiled import uncompiled
from bnnft.tracing.elements import REARRANGING, Elements, elements_of, storage_of
from bnnft.tracing.origins import CONSTANT, Origin, Origins, merged
from bnnft.tracing.tracking import LINEAR_MAPS

# operations whose results have the form of a tensor, but not its values
_FORMS = {"zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like"}
_FORMS |= {"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"}
# operations that give a tensor the form of another one
_GIVES_FORM = {"type_as", "view_as", "expand_as", "reshape_as"}
# operations that draw random numbers
_RANDOM = ("rand", "normal", "bernoulli", "multinomial", "poisson")


class Provenance(TorchFunctionMode):
    """Follows tensors while active, in eager mode; changes nothing unless a subclass does.

    It is active around the code in its context, in that thread also in what a backward recomputes, and by hooks in the
    forwards of the model's modules in every other thread.

    Args:
        model: whose parameters are followed.

    Attributes:
        origins: of the tensors that are not of the batch.
        constants: tensors from outside of the model that are no part of the batch.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.origins = model, Origins(model)
        self.constants: list[Tensor] = []
        self._thread = threading.local()
        self._stack = ExitStack()

    # --- what subclasses do -------------------------------------------------------------------------------------

    def made(self, result: Tensor, operation: str, elements: Elements) -> tuple[Tensor, Any]:
        """Return what to use in place of a float tensor that was made of parameters element by element, and a mark.

        Called for each tensor without marks; ``None`` is no mark.
        """
        return result, None

    def used(self, operand: Tensor, operation: str, first: bool, origin: Origin) -> Tensor:
        """Return what to use in place of an operand that an operation combines with the batch."""
        return operand

    def read(self, parameter: str, values: Tensor, operation: str) -> Tensor:
        """Return what to use in place of a parameter (or a view of it) that an operation reads."""
        return values

    # --- being active -------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.origins.written.clear()
        for name, parameter in self.origins.parameters.items():
            self.origins.own(name, parameter)
        for constant in self.constants:
            self.origins.keep(constant, CONSTANT)
        for name, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # nobody sees what it does
            self.origins.register(module, name)
            enter, leave = partial(self._enter_module, name), self._leave_module
            self._stack.callback(module.register_forward_pre_hook(enter).remove)
            # always: an error in a forward must leave neither its name nor the mode behind
            self._stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        self._stack.enter_context(uncompiled(self.model))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        others = []  # that were entered since, and are left later
        while self in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            if (top := _pop_mode()) is not self:  # type: ignore[no-untyped-call]
                others.append(top)
        for mode in reversed(others):
            _push_mode(mode)  # type: ignore[no-untyped-call]
        self._stack.close()
        self._within.clear()  # what an interrupt has left there
        self.origins.clear()

    @property
    def place(self) -> str:
        """The qualified name of the innermost module that runs now, empty outside of all."""
        return self._within[-1][0] if self._within else ""

    @property
    def in_forward(self) -> bool:
        """Whether a module's forward runs now."""
        return bool(self._within)

    @property
    def _within(self) -> list[tuple[str, bool]]:
        """The modules that run now in this thread, and whether their hooks have entered the mode."""
        within: list[tuple[str, bool]] = self._thread.__dict__.setdefault("within", [])
        return within

    def _enter_module(self, name: str, module: nn.Module, args: Any) -> None:
        entered = self not in _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        self._within.append((name, entered))
        with torch._C.DisableTorchFunction():
            self.origins.register(module, name)
        if entered:
            super().__enter__()  # type: ignore[no-untyped-call]

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._within and self._within.pop()[1]:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _again(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function while active: what it calls inside is seen then."""
        super().__enter__()  # type: ignore[no-untyped-call]
        try:
            return function(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    # --- operations ---------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for kind in types:
            if not issubclass(kind, Tensor):  # a tensor of another library
                return self._again(kind.__torch_function__, func, types, args, kwargs)
        if func is Tensor.backward:  # which may recompute
            gradient, retain, create = (kwargs.get(k) for k in ("gradient", "retain_graph", "create_graph"))
            inputs = kwargs.get("inputs")
            return self._again(torch.autograd.backward, args[0], gradient, retain, bool(create), inputs=inputs)
        given = [unwrapped(tensor) for tensor in tensors_in((args, kwargs))]
        origins = [self.origins.of(tensor) for tensor in given]
        if given and not any(origin is not None for origin in origins):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        operation = name.strip("_")
        if operation in _GIVES_FORM:
            given, origins = given[:1], origins[:1]
        in_place = name.startswith(("__i", "__setitem", "__set__")) or (name.endswith("_") and not name.endswith("__"))
        with torch._C.DisableTorchFunction():  # our own operations are nobody's business
            changes = self._changes(operation, given, origins, in_place)
            before = storage_of(given[0]) if operation == "set" else None
        if changes:
            args, kwargs = replaced(args, changes), replaced(kwargs, changes)
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            if before is not None:
                self.origins.moved(given[0], before)
            elif in_place and given:
                self._write(operation, given, origins)
            elif not any(origin is None for origin in origins):
                return self._results(func, operation, given, origins, args, kwargs, result)
        return result

    def _changes(
        self, operation: str, given: list[Tensor], origins: list[Origin | None], in_place: bool
    ) -> dict[int, Tensor]:
        """Return what an operation is to take in place of its operands, by their identities."""
        of_batch, changes = any(origin is None for origin in origins), {}
        for number, (tensor, origin) in enumerate(zip(given, origins, strict=True)):
            written = in_place and number == 0
            if origin is None or written or operation in _FORMS or not tensor.is_floating_point():
                continue
            now, owner = tensor, self.origins.owner(tensor)
            if owner is not None and operation not in REARRANGING:
                now = self.read(owner, tensor, operation)
            is_used = of_batch or (origin.marks and operation.startswith(LINEAR_MAPS))
            if is_used and (origin.marks or tensor.dim() > 1):
                now = self.used(now, operation, number == 0, origin)
            if now is not tensor:
                changes[id(tensor)] = now
        return changes

    def _write(self, operation: str, given: list[Tensor], origins: list[Origin | None]) -> None:
        """Take note of what a write makes of its target; a parameter stays one, whatever is written to it."""
        target = given[0]
        if (owner := self.origins.owner(target)) is not None:
            self.origins.written.add(owner)
            return
        if any(origin is None for origin in origins):
            self.origins.forget(target)
            return
        origin = merged(origins)
        self.origins.keep(target, origin)
        found = self.origins.elements(target) or elements_of(self.origins, operation, given, target, origin.parameters)
        if found is not None and not origin.marks:
            self.origins.view(target, found)
            now, mark = self.made(target, operation, found)
            _write_over(target, now)
            if mark is not None:
                self.origins.keep(target, Origin(origin.parameters, frozenset(), frozenset([mark])))

    def _results(
        self,
        func: Any,
        operation: str,
        given: list[Tensor],
        origins: list[Origin | None],
        args: Any,
        kwargs: Any,
        out: Any,
    ) -> Any:
        """Take note of what was made of parameters and constants alone, and let a subclass change it."""
        if operation.startswith(_RANDOM) and not given:
            for tensor in tensors_in((out,)):  # of the batch, unless a parameter is compared with it, say
                if any(tensor.shape == parameter.shape for parameter in self.origins.parameters.values()):
                    self.origins.keep(tensor, CONSTANT)
            return out
        origin, changes = CONSTANT if operation in _FORMS else merged(origins), {}
        companions = partial(self._rearranged, func, given, args, kwargs)
        for number, result in enumerate(tensors_in((out,))):
            tensor = unwrapped(result)
            if any(tensor is other for other in given):
                continue
            if operation == "get" and storage_of(tensor) != storage_of(given[0]):
                continue  # a gradient
            is_view = self.origins.owner(tensor) is not None
            if not is_view:
                self.origins.keep(tensor, origin)
            if operation in _FORMS:
                continue
            found = elements_of(self.origins, operation, given, tensor, origin.parameters, companions, number)
            if found is None:
                continue
            self.origins.view(tensor, found)
            if is_view or origin.marks or not tensor.is_floating_point():
                continue
            now, mark = self.made(tensor, operation, found)
            if tensor is not result:  # nothing can be put in the place of a wrapped tensor
                now = _write_over(tensor, now)
            elif now is not tensor:
                changes[id(tensor)] = now
            if mark is not None:
                self.origins.keep(now, Origin(origin.parameters, frozenset(), frozenset([mark])), found)
        return replaced(out, changes) if changes else out

    def _rearranged(self, func: Any, given: list[Tensor], args: Any, kwargs: Any) -> list[Tensor]:
        """Return what a rearranging operation makes of the places of the elements, a tensor for each result."""
        places = {
            id(tensor): elements.places(self.origins, tensor.shape, tensor.device)
            for tensor in given
            if tensor.is_floating_point() and (elements := self.origins.elements(tensor)) is not None
        }
        return list(tensors_in((func(*replaced(args, places), **replaced(kwargs, places)),)))


def _write_over(target: Tensor, values: Tensor) -> Tensor:
    """Write values into a tensor behind autograd's back, so that its gradient passes as if they were its own."""
    if values is not target:
        with torch.no_grad():
            target.copy_(values)
    return target
