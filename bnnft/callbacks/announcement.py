"""Say once in a run which published figures it stands on."""

from weakref import WeakKeyDictionary

from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info

from bnnft.ber import ErrorModel

_said: WeakKeyDictionary[Trainer, set[str]] = WeakKeyDictionary()


def announce(trainer: Trainer, error_model: ErrorModel) -> None:
    """Print rate and source of an error model that has a source, and log both with the run's config."""
    source, name = error_model.source, repr(error_model)
    said = _said.setdefault(trainer, set())
    if not source or name in said:
        return
    said.add(name)
    rate = error_model.rate
    shown = "" if rate is None else f"bit error rate {100 * rate:.3g} %, "
    rank_zero_info(f"{name}: {shown}from {source}")
    for logger in trainer.loggers:
        logger.log_hyperparams({"error_model": {"model": name, "rate": rate, "source": source}})
