"""See every operation of a model as it runs, and in which module it runs."""

from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# how the names of operations begin that multiply by weights
LINEAR_MAPS = (
    *("linear", "conv", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "bilinear", "embedding"),
    *("multi_head_attention_forward", "lstm", "gru", "rnn"),
)


def tensors(tree: Any) -> tuple[Tensor, ...]:
    """Return all tensors in nested arguments."""
    return tuple(leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def operation_name(func: Any) -> str:
    """Return the name of a torch function, the same for a function, a method and an operator in place."""
    return getattr(func, "__name__", "").strip("_")


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two tensors share that are the same view of the same memory, as ``x`` and ``x.detach()`` are.

    It tells tensors apart as long as they live: who remembers it keeps a reference to the tensor.
    """
    place = memory(tensor)
    return (place, tensor.storage_offset(), tensor.shape, tensor.stride()) if isinstance(place, int) else place


def memory(tensor: Tensor) -> int | tuple[str, int]:
    """Return the address of a tensor's memory; of one that has none, a distributed tensor, say, its own identity."""
    try:
        return tensor.untyped_storage().data_ptr() or ("object", id(tensor))
    except (RuntimeError, NotImplementedError):
        return "object", id(tensor)


def is_alive(tensor: Tensor) -> bool:
    """Return whether a tensor has its memory still; FSDP2 takes it from whole weights that are not needed now."""
    try:
        needed = (tensor.storage_offset() + tensor.numel()) * tensor.element_size() if tensor.is_contiguous() else 1
        return tensor.numel() == 0 or tensor.untyped_storage().nbytes() >= needed
    except (RuntimeError, NotImplementedError):  # a distributed tensor, say, has none of its own
        return True


class Tracking(TorchFunctionMode):
    """Base of modes that look at or change operations while a model runs, in eager mode, on one thread.

    A subclass implements :meth:`operation`, and :meth:`entered` and :meth:`left` where it cares for modules.
    Scripted modules take no hooks and are seen as one operation of their parent at most.

    Args:
        model: whose modules are named in :attr:`within`.
        only: names of the modules to follow; all if ``None``.
    """

    def __init__(self, model: nn.Module, only: Collection[str] | None = None) -> None:
        super().__init__()
        self.model = model
        self.within: list[str] = []  # qualified names of the modules that run now, the innermost last
        self._only = only
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        try:
            for name, module in self.model.named_modules():
                if not isinstance(module, torch.jit.ScriptModule) and (self._only is None or name in self._only):
                    enter, leave = partial(self._enter, name), partial(self._leave, name)
                    self._hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                    # always: an error in a forward must not leave its name on the stack
                    hook = module.register_forward_hook(leave, with_kwargs=True, always_call=True)
                    self._hooks.callback(hook.remove)
            self._hooks.enter_context(torch.compiler.set_stance("force_eager"))
            super().__enter__()  # type: ignore[no-untyped-call]
        except BaseException:
            self._hooks.close()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            super().__exit__(*exception)  # type: ignore[no-untyped-call]
        finally:
            self._hooks.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for kind in types:
            if not issubclass(kind, Tensor):  # a tensor of another library: what it calls inside is seen then
                with self._inside():
                    return kind.__torch_function__(func, types, args, kwargs)
        return self.operation(func, args, kwargs)

    def _inside(self) -> TorchFunctionMode:
        mode: TorchFunctionMode = _Passing(self)
        return mode

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one operation and return its result."""
        return func(*args, **kwargs)

    def entered(self, name: str, inputs: tuple[Tensor, ...]) -> None:
        """Take note of a module that starts."""

    def left(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> Any:
        """Take note of a module that is done; what is returned and not ``None`` takes the place of its output."""

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.within.append(name)
        with torch._C.DisableTorchFunction():  # what is done to look is no operation of the model
            self._call(self.entered, name, tensors((args, kwargs)))

    def _leave(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        try:
            with torch._C.DisableTorchFunction():
                return self._call(self.left, name, module, tensors((args, kwargs)), tensors(output))
        finally:
            self.within.pop()

    def _call(self, method: Callable[..., Any], *args: Any) -> Any:
        return method(*args)


class Looking(Tracking):
    """Base of modes that only look: an error of theirs ends no forward, it is kept, and they look no more.

    A subclass implements :meth:`before` and :meth:`after`.

    Args:
        model: whose modules are named in :attr:`within`.
        only: names of the modules to follow; all if ``None``.

    Attributes:
        error: what went wrong, ``None`` if nothing did.
    """

    def __init__(self, model: nn.Module, only: Collection[str] | None = None) -> None:
        super().__init__(model, only)
        self.error: Exception | None = None

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one operation, and look at what it is given and what it makes."""
        noted = self._call(self.before, func, args, kwargs)
        result = func(*args, **kwargs)
        return result if self.error is not None else self._call(self.after, noted, result, otherwise=result)

    def before(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Take note of an operation that is to run; what is returned is given to :meth:`after`."""

    def after(self, noted: Any, result: Any) -> Any:
        """Take note of the result of an operation, and return what is to take its place."""
        return result

    def _call(self, method: Callable[..., Any], *args: Any, otherwise: Any = None) -> Any:
        if self.error is None:
            try:
                return method(*args)
            except Exception as error:
                self.error = error
        return otherwise


class _Passing(TorchFunctionMode):
    """Hands operations to another mode, without its hooks."""

    def __init__(self, to: Tracking) -> None:
        super().__init__()
        self._to = to

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._to.__torch_function__(func, types, args, kwargs)
