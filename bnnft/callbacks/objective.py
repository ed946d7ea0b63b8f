"""Refuse early what a sweep could not optimize in the end."""

from collections.abc import Sequence

from lightning import Callback, LightningModule, Trainer


class Objective(Callback):
    """Ends a run whose objective can't be.

    Before the first step where it needs a validation that there is not, after the first validation where that did not
    log it.

    Args:
        names: of one metric that a sweeper optimizes, or of several; those that start with ``val/`` are checked.

    Raises:
        ValueError: there will be no such metric.

    Example:
        >>> Objective("val/acc").names
        ('val/acc',)
    """

    def __init__(self, names: str | Sequence[str]) -> None:
        self.names = (names,) if isinstance(names, str) else tuple(names)

    @property
    def validated(self) -> list[str]:
        """Those that a validation logs."""
        return [name for name in self.names if name.startswith("val/")]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See that there is a validation."""
        if stage == "fit" and self.validated and trainer.limit_val_batches == 0:
            raise ValueError(
                f"optimized_metric={self.validated[0]!r} needs validation, but limit_val_batches of the trainer is 0"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that the validation logged them."""
        if not trainer.sanity_checking and (
            missing := [n for n in self.validated if n not in trainer.callback_metrics]
        ):
            logged = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise ValueError(f"optimized_metric must be among {logged}, or of the test; got {missing[0]!r}")
