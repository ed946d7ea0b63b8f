"""See every operation of a model as it runs, and in which module it runs."""

from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, Self

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


class Place(NamedTuple):
    """Where an operation runs.

    Attributes:
        module: qualified name of the innermost module.
        number: of the operation within one run of this module.
    """

    module: str
    number: int


class Tracking(TorchFunctionMode):
    """Base of modes that look at or change operations while a model runs, in eager mode, on one thread.

    A subclass implements :meth:`operation`, and :meth:`entered` and :meth:`left` where it cares for modules.

    Args:
        model: whose modules are named in :attr:`within`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.within: list[str] = []  # qualified names of the modules that run now, the innermost last
        self._operations = [0]  # that ran in each of them so far
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        for name, module in self.model.named_modules():
            enter, leave = partial(self._enter, name), partial(self._leave, name)
            self._hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            # always: an error in a forward must not leave its name on the stack
            self._hooks.callback(module.register_forward_hook(leave, with_kwargs=True, always_call=True).remove)
        self._hooks.enter_context(torch.compiler.set_stance("force_eager"))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for kind in types:
            if not issubclass(kind, Tensor):  # a tensor of another library: what it calls inside is seen then
                with self._inside():
                    return kind.__torch_function__(func, types, args, kwargs)
        self._operations[-1] += 1
        return self.operation(func, args, kwargs)

    @property
    def place(self) -> Place:
        """Where the operation that runs now is."""
        return Place(self.within[-1] if self.within else "", self._operations[-1])

    def _inside(self) -> TorchFunctionMode:
        mode: TorchFunctionMode = _Passing(self)
        return mode

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one operation and return its result."""
        return func(*args, **kwargs)

    def entered(self, name: str, inputs: tuple[Tensor, ...]) -> None:
        """Take note of a module that starts."""

    def left(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        """Take note of a module that is done."""

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.within.append(name)
        self._operations.append(0)
        self.entered(name, tensors((args, kwargs)))

    def _leave(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.left(name, module, tensors((args, kwargs)), tensors(output))
        self.within.pop()
        self._operations.pop()


class _Passing(TorchFunctionMode):
    """Hands operations to another mode, without its hooks."""

    def __init__(self, to: Tracking) -> None:
        super().__init__()
        self._to = to

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._to.__torch_function__(func, types, args, kwargs)
