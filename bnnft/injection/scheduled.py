"""The error model of each training batch, as a schedule says."""

from bnnft.ber import Constant, Curriculum, ErrorModel, Schedule, checked_schedule


class ScheduledErrors:
    """An error model whose rate moves over training.

    Args:
        error_model: at its whole rate.
        schedule: of its rate; the whole one always if ``None`` or constant.
        seed: of the flips, for schedules that draw.

    Attributes:
        whole: the error model at its whole rate.
        start: the batch at which the schedule began, ``None`` as long as it waits for a low loss.

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
        self.whole, self._seed = error_model, seed
        self._last = 1.0, error_model

    def factor(self, batch: int) -> float:
        """Return which part of its rate the error model has in a batch."""
        if self.schedule is None:
            return 1.0
        return 0.0 if self.start is None else self.schedule.factor(batch - self.start, self._seed)

    def at(self, batch: int) -> ErrorModel:
        """Return the error model of a batch."""
        factor = self.factor(batch)
        if factor != self._last[0]:  # a chip keeps its cells as long as its rate stays
            self._last = factor, self.whole.scaled(factor)
        return self._last[1]

    @property
    def waits(self) -> bool:
        """Whether it waits for the loss of a batch to be low."""
        return self.start is None and isinstance(self.schedule, Curriculum)

    def learn(self, loss: float, next_batch: int) -> None:
        """Begin at the next batch, if that waits for a low loss and this one is."""
        if self.waits and loss < self.schedule.loss_below:  # type: ignore[union-attr]
            self.start = next_batch
