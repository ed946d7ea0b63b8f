"""The error model of each training step, as a schedule says."""

from typing import Any

from lightning import Trainer
from torch import Tensor

from bnnft.ber import Constant, Curriculum, ErrorModel, Schedule, checked_schedule


class ScheduledErrors:
    """An error model whose rate moves over training.

    Args:
        error_model: at its whole rate.
        schedule: of its rate; the whole one always if ``None`` or constant.
        seed: of the flips, for schedules that draw.

    Raises:
        TypeError: no schedule, or the error model has no rate that could move.
    """

    def __init__(self, error_model: ErrorModel, schedule: Schedule | None, seed: int) -> None:
        checked_schedule(schedule)
        # the whole rate always: also of errors that have no rate, and nothing to log
        self.schedule = None if isinstance(schedule, Constant) else schedule
        if self.schedule is not None:
            error_model.scaled(0.5)  # raises if it has no rate
        self.start: int | None = None if isinstance(schedule, Curriculum) else 0
        self._whole, self._seed = error_model, seed
        self._last = 1.0, error_model

    def factor(self, step: int) -> float:
        """Return which part of its rate the error model has at a step."""
        if self.schedule is None:
            return 1.0
        return 0.0 if self.start is None else self.schedule.factor(step - self.start, self._seed)

    def at(self, step: int) -> ErrorModel:
        """Return the error model of a step."""
        factor = self.factor(step)
        if factor != self._last[0]:  # a chip keeps its cells as long as its rate stays
            self._last = factor, self._whole.scaled(factor)
        return self._last[1]

    def learn(self, trainer: Trainer, outputs: Any, next_step: int) -> None:
        """Begin at the next step, if that waits for the loss of a batch and it is low enough on all processes together.

        Raises:
            ValueError: there is no loss to see.
        """
        if self.start is not None or not isinstance(self.schedule, Curriculum):
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor):
            if outputs:
                raise ValueError(f"Curriculum needs training_step to return the loss, got {type(outputs).__name__}")
            return
        mean: Any = trainer.strategy.reduce(loss.detach(), reduce_op="mean")
        # Lightning hands it over divided, with automatic optimization (with manual one this is 1)
        if float(mean) * trainer.accumulate_grad_batches < self.schedule.loss_below:
            self.start = next_step
