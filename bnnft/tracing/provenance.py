"""Follow where tensors come from: which are made of parameters, buffers and constants alone, and of which elements.

Every other tensor is made of the batch. No operations are counted, so that a weight may be used any number of times,
in batches of any size, in any thread that runs the model's modules.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from bnnft.tracing.compiled import uncompiled
from bnnft.tracing.elements import REARRANGING, Elements, elements_of
from bnnft.tracing.tracking import LINEAR_MAPS

# operations whose results have the form of a tensor, but not its values
_FORMS = {"zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like"}
_FORMS |= {"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "type_as", "view_as", "expand_as"}
# operations that draw random numbers
_RANDOM = ("rand", "normal", "bernoulli", "multinomial", "poisson")


class Origin(NamedTuple):
    """What a tensor is made of.

    Attributes:
        parameters: names of the parameters behind it.
        floats: those whose values came to it without passing a mark.
        marks: what :meth:`Provenance.made` left on the tensors behind it.
    """

    parameters: frozenset[str] = frozenset()
    floats: frozenset[str] = frozenset()
    marks: frozenset[Any] = frozenset()


_CONSTANT = Origin()


def tensors_in(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among arguments, and in lists among them."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from tensors_in(argument)
        elif isinstance(argument, dict):
            yield from tensors_in(argument.values())


def replaced(arguments: Any, changes: dict[int, Tensor]) -> Any:
    """Return arguments in which tensors are replaced, given by their identities."""
    if isinstance(arguments, Tensor):
        return changes.get(id(arguments), arguments)
    if isinstance(arguments, list | tuple) and type(arguments) in (list, tuple):
        return type(arguments)(replaced(argument, changes) for argument in arguments)
    if isinstance(arguments, dict):
        return {name: replaced(argument, changes) for name, argument in arguments.items()}
    return arguments


class Provenance(TorchFunctionMode):
    """Follows tensors while active, in eager mode; changes nothing unless a subclass does.

    It is active around the code in its context, in that thread also in what a backward recomputes, and by hooks in the
    forwards of the model's modules in every other thread.

    Args:
        model: whose parameters are followed.

    Attributes:
        parameters: by qualified name, a tied one under its first name.
        modules: by qualified name; without scripted ones, whose operations nobody sees.
        written: names of parameters that an operation wrote to.
        constants: tensors from outside of the model that are no part of the batch.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.parameters = {n: p for n, p in model.named_parameters() if not is_lazy(p)}
        scripted = (torch.jit.ScriptModule, torch.jit.ScriptFunction)
        self.modules = {name: module for name, module in model.named_modules() if not isinstance(module, scripted)}
        self._origins: dict[int, tuple[Origin, Tensor]] = {}  # by storage; the tensor keeps its memory from being reused
        self._elements: dict[Any, Elements] = {}  # by storage and layout
        self._owners: dict[int, str] = {}  # storages of parameters
        self.written: set[str] = set()
        self.constants: list[Tensor] = []
        self._thread = threading.local()
        self._stack = ExitStack()

    # --- what subclasses do -------------------------------------------------------------------------------------

    def made(self, result: Tensor, operation: str, elements: Elements) -> tuple[Tensor, Any]:
        """Return what is to be used in place of a float tensor that was made of parameters element by element, and a mark.

        Called for each tensor without marks; ``None`` is no mark.
        """
        return result, None

    def used(self, operand: Tensor, operation: str, first: bool, origin: Origin) -> Tensor:
        """Return what is to be used in place of an operand that an operation combines with the batch."""
        return operand

    def read(self, parameter: str, values: Tensor, operation: str) -> Tensor:
        """Return what is to be used in place of a parameter (or a view of it) that an operation reads."""
        return values

    # --- being active -------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.written.clear()
        self._register(self.model)
        for name, module in self.modules.items():
            self._register(module, f"{name}." if name else "")
        for constant in self.constants:
            self._keep(constant, _CONSTANT)
        for name, module in self.watched_modules().items():
            hooks = partial(self._enter_module, name), partial(self._leave_module, name)
            self._stack.callback(module.register_forward_pre_hook(hooks[0]).remove)
            # always: an error in a forward must leave neither its name nor the mode behind
            self._stack.callback(module.register_forward_hook(hooks[1], always_call=True).remove)
        self._stack.enter_context(uncompiled(self.model))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        self._leave()
        self._stack.close()
        self._origins.clear()
        self._elements.clear()
        self._owners.clear()

    def _leave(self) -> None:
        """Leave the stack of modes, wherever in it: others may have been entered since and be left later."""
        if self in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            above = []
            while (top := _pop_mode()) is not self:  # type: ignore[no-untyped-call]
                above.append(top)
            for mode in reversed(above):
                _push_mode(mode)  # type: ignore[no-untyped-call]

    def watched_modules(self) -> dict[str, nn.Module]:
        """Return the modules whose forwards are watched in every thread, and named in :attr:`place`."""
        return self.modules

    @property
    def place(self) -> str:
        """The qualified name of the innermost module that runs now, empty outside of all."""
        within = self._within
        return within[-1][0] if within else ""

    @property
    def in_forward(self) -> bool:
        """Whether a module's forward runs now."""
        return bool(self._within)

    @property
    def _within(self) -> list[tuple[str, bool]]:
        try:
            within: list[tuple[str, bool]] = self._thread.within
        except AttributeError:
            within = self._thread.within = []
        return within

    def _enter_module(self, name: str, module: nn.Module, args: Any) -> None:
        entered = self not in _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        self._within.append((name, entered))
        with torch._C.DisableTorchFunction():
            self._register(module, f"{name}." if name else "")
        if entered:
            super().__enter__()  # type: ignore[no-untyped-call]

    def _leave_module(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        _, entered = self._within.pop()
        if entered:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    @contextmanager
    def _again(self) -> Iterator[None]:
        super().__enter__()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    # --- what is known ------------------------------------------------------------------------------------------

    def _register(self, module: nn.Module, prefix: str | None = None) -> None:
        """Take note of what a module holds now: parameters may be others than before, gathered ones of shards, say."""
        if prefix is None:
            for name, parameter in self.parameters.items():
                self._own(name, parameter)
            return
        for name, parameter in module._parameters.items():
            if parameter is None or is_lazy(parameter):
                continue
            if self._key(parameter) not in self._owners:
                self.parameters[prefix + name] = parameter  # new, or another one than before
                self._own(prefix + name, parameter)
        held = [*module._buffers.values(), *(value for value in vars(module).values() if isinstance(value, Tensor))]
        for tensor in held:
            if tensor is not None and self._key(tensor) not in self._owners:
                self._keep(tensor, _CONSTANT)

    def _own(self, name: str, parameter: Tensor) -> None:
        self._owners[self._key(parameter)] = name
        self._keep(parameter, Origin(frozenset([name]), frozenset([name])))
        self._elements[self._layout(parameter)] = Elements(name)
        for value in vars(parameter).values():
            if isinstance(value, Tensor) and value is not parameter.grad:
                self._keep(value, _CONSTANT)  # a latent that hangs on its parameter, say

    @staticmethod
    def _key(tensor: Tensor) -> int:
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        try:
            return tensor.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):  # sparse ones have no storage
            return id(tensor)

    def _layout(self, tensor: Tensor) -> Any:
        if tensor.layout != torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return id(tensor)
        return self._key(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()

    def _keep(self, tensor: Tensor, origin: Origin) -> None:
        self._origins[self._key(tensor)] = origin, tensor

    def origin(self, tensor: Tensor) -> Origin | None:
        """Return what a tensor is made of, ``None`` if it is of the batch."""
        found = self._origins.get(self._key(tensor))
        return None if found is None else found[0]

    def elements(self, tensor: Tensor) -> Elements | None:
        """Return which elements of parameters a tensor's elements stand for, if it is known."""
        return self._elements.get(self._layout(tensor))

    def owner(self, tensor: Tensor) -> str | None:
        """Return the name of the parameter that a tensor is, or is a view of."""
        return self._owners.get(self._key(tensor))

    # --- operations ---------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for kind in types:
            if not issubclass(kind, Tensor):  # a tensor of another library: what it calls inside is seen then
                with self._again():
                    return kind.__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", "")
        if func is Tensor.backward:  # what it recomputes is seen then
            with self._again():
                gradient, *options = (kwargs.get(name) for name in ("gradient", "retain_graph", "create_graph", "inputs"))
                return torch.autograd.backward(args[0], gradient, options[0], bool(options[1]), inputs=options[2])
        given = list(tensors_in((args, kwargs)))
        origins = [self.origin(tensor) for tensor in given]
        if given and not any(origin is not None for origin in origins):
            return func(*args, **kwargs)
        if not given and name.startswith(_RANDOM):
            return self._drawn(func(*args, **kwargs))
        return self._followed(func, name, given, origins, args, kwargs)

    def _followed(self, func: Any, name: str, given: list[Tensor], origins: Any, args: Any, kwargs: Any) -> Any:
        operation = name.strip("_")
        in_place = name.startswith(("__i", "__setitem", "__set__")) or (name.endswith("_") and not name.endswith("__"))
        of_batch = any(origin is None for origin in origins)
        changes: dict[int, Tensor] = {}
        for number, (tensor, origin) in enumerate(zip(given, origins, strict=True)):
            written = in_place and number == 0
            if origin is None or written or operation in _FORMS or not tensor.is_floating_point():
                continue
            now = tensor
            owner = self.owner(tensor)
            if owner is not None and operation not in REARRANGING:
                now = self.read(owner, tensor, operation)
            is_used = of_batch or (origin.marks and operation.startswith(LINEAR_MAPS))
            if is_used and (origin.marks or tensor.dim() > 1):
                now = self.used(now, operation, number == 0, origin)
            if now is not tensor:
                changes[id(tensor)] = now
        if changes:
            args, kwargs = replaced(args, changes), replaced(kwargs, changes)
        before = self._key(given[0]) if operation == "set" and given else None
        result = func(*args, **kwargs)
        if before is not None and self._key(given[0]) != before:  # ``parameter.data = values``
            self._origins.pop(before, None)
            owner = self._owners.pop(before, None)
            if owner is not None:
                self._own(owner, given[0])
                self.written.add(owner)
            return result
        if in_place and given:
            self._written(given, origins, of_batch, operation)
        elif not of_batch:
            result = self._results(func, operation, given, origins, args, kwargs, result)
        return result

    def _drawn(self, result: Any) -> Any:
        """Take note of random numbers: of the batch, unless they have the form of a parameter, to round it by, say."""
        for tensor in tensors_in((result,)):
            if any(tensor.shape == parameter.shape for parameter in self.parameters.values()):
                self._keep(tensor, _CONSTANT)
        return result

    def _written(self, given: list[Tensor], origins: list[Any], of_batch: bool, operation: str) -> None:
        """Take note of what a write makes of its target; a parameter stays one, whatever is written to it."""
        target = given[0]
        if (owner := self.owner(target)) is not None:
            self.written.add(owner)
            return
        if of_batch:
            self._origins.pop(self._key(target), None)
            return
        origin = self._merged(origins)
        self._keep(target, origin)
        elements = self.elements(target) or elements_of(self, operation, given, target, origin.parameters)
        if elements is not None and not origin.marks:
            self._elements[self._layout(target)] = elements
            now, mark = self.made(target, operation, elements)
            if now is not target:
                with torch.no_grad():
                    target.copy_(now)
            if mark is not None:
                self._keep(target, Origin(origin.parameters, frozenset(), frozenset([mark])))

    def _results(
        self, func: Any, operation: str, given: list[Tensor], origins: list[Any], args: Any, kwargs: Any, result: Any
    ) -> Any:
        """Take note of what was made of parameters and constants alone, and let a subclass change it."""
        origin = _CONSTANT if operation in _FORMS else self._merged(origins)
        changes: dict[int, Tensor] = {}
        companions: Callable[[], Any] = partial(self._rearranged, func, given, args, kwargs)
        for number, tensor in enumerate(tensors_in((result,))):
            if any(tensor is other for other in given):
                continue
            is_view = self.owner(tensor) is not None
            if not is_view:
                self._keep(tensor, origin)
            if operation in _FORMS:
                continue
            elements = elements_of(self, operation, given, tensor, origin.parameters, companions, number)
            if elements is None:
                continue
            self._elements[self._layout(tensor)] = elements
            if is_view or origin.marks or not tensor.is_floating_point():
                continue
            now, mark = self.made(tensor, operation, elements)
            marks = frozenset() if mark is None else frozenset([mark])
            if now is not tensor:
                changes[id(tensor)] = now
                self._elements[self._layout(now)] = elements
            self._keep(now, Origin(origin.parameters, frozenset() if marks else origin.floats, marks))
        return replaced(result, changes) if changes else result

    def _rearranged(self, func: Any, given: list[Tensor], args: Any, kwargs: Any) -> list[Tensor]:
        """Return what a rearranging operation makes of the places of the elements, a tensor for each result."""
        places = {}
        for tensor in given:
            elements = self.elements(tensor)
            if elements is not None:
                places[id(tensor)] = elements.places(self, tensor.shape, tensor.device)
        return list(tensors_in((func(*replaced(args, places), **replaced(kwargs, places)),)))

    @staticmethod
    def _merged(origins: Iterable[Any]) -> Origin:
        known = [origin for origin in origins if origin is not None]
        return Origin(*(frozenset().union(*(origin[field] for origin in known)) for field in range(3)))
