"""Tell when optimizers step in manual optimization, where no hook of Lightning's need run."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


class ManualSteps:
    """Calls ``before`` ahead of each update of any optimizer, and ``again`` at the module's first forward after it.

    Optimizers are seen whether Lightning knows them or not. A closure that is handed to one belongs to the part
    before its update: ``before`` is called when it returns.

    Args:
        module: whose forward, or that of any of its parts, ends the update.
        before: called ahead of each update.
        again: called ahead of the first forward after each update.
    """

    def __init__(self, module: nn.Module, before: Callable[[], None], again: Callable[[], None]) -> None:
        self._module, self._before, self._again = module, before, again
        self._forward: RemovableHandle | None = None
        self._hooks = [
            register_optimizer_step_pre_hook(self._on_step),
            register_optimizer_step_post_hook(lambda *args: self._expect_forward()),
        ]

    def close(self) -> None:
        """Stop calling."""
        while self._hooks:
            self._hooks.pop().remove()
        self._expect_none()

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        _, *given = args  # torch hands the optimizer itself on as the first argument
        closure = given[0] if given else kwargs.get("closure")
        self._expect_none()
        if closure is None:
            self._before()
            return None

        def closed() -> Any:
            result = closure()
            self._before()
            return result

        return ((args[0], closed, *given[1:]), kwargs) if given else (args, kwargs | {"closure": closed})

    def _expect_forward(self) -> None:
        modules = set(self._module.modules())

        def forward(module: nn.Module, args: Any) -> None:
            if module in modules:
                self._expect_none()
                self._again()

        self._expect_none()
        self._forward = register_module_forward_pre_hook(forward)

    def _expect_none(self) -> None:
        if self._forward is not None:
            self._forward.remove()
            self._forward = None
