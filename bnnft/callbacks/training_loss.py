"""The loss of a module that somebody else wrote, without leaving a trace in it."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torchmetrics import Metric


def training_loss(trainer: Trainer, module: LightningModule, batch: Any) -> Tensor:
    """Return the loss that ``training_step`` computes for a batch, in the mode that the module is in.

    What the step logs is dropped, and the states of torchmetrics inside the module are put back.

    Raises:
        ValueError: the step can't be called for its loss alone.
    """
    remedy = "give ToleranceMetrics a loss=... that maps (module, batch) to the loss"
    if not module.automatic_optimization:
        raise ValueError(f"importance needs a loss, but training_step of {type(module).__name__} optimizes: {remedy}")
    accepted = inspect.signature(module.training_step).parameters
    if "dataloader_iter" in accepted:
        raise ValueError(f"importance needs a loss, but training_step of {type(module).__name__} fetches: {remedy}")
    with untouched(trainer, module):
        result = module.training_step(*([batch, 0] if len(accepted) > 1 else [batch]))
    loss = result.get("loss") if isinstance(result, dict) else result
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"importance needs a loss, but training_step of {type(module).__name__} returned {type(loss).__name__}: "
            f"{remedy}"
        )
    return loss


@contextmanager
def untouched(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Drop what a step of the module logs, and put back the states of torchmetrics inside of it."""
    hidden = ("_update_count", "_computed", "_forward_cache")
    metrics = [metric for metric in module.modules() if isinstance(metric, Metric)]
    saved = [{name: deepcopy(getattr(metric, name)) for name in (*metric.metric_state, *hidden)} for metric in metrics]
    loggers = trainer.loggers
    own = {name: value for name, value in vars(module).items() if name in ("log", "log_dict")}
    stack = ExitStack()
    try:
        stack.callback(vars(module).update, own)
        for name in ("log", "log_dict"):
            stack.callback(vars(module).pop, name, None)
            object.__setattr__(module, name, lambda *args, **kwargs: None)
        stack.callback(setattr, trainer, "loggers", loggers)
        trainer.loggers = [DummyLogger() for _ in loggers]
        for metric, state in zip(metrics, saved, strict=True):
            for name, value in state.items():
                stack.callback(setattr, metric, name, value)
        yield
        stack.close()
    except BaseException:
        stack.close()
        raise
