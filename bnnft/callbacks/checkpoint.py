"""Checkpoints that are whole, that are written when a run is stopped, and that can be moved."""

import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException


class Checkpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``, which also keeps what was logged when the best checkpoint was written.

    - Files are written beside their place and renamed: what is there is whole, and stays when the disk is full.
    - ``last.ckpt`` is written after each validation, and where SIGTERM ends a run, also in the middle of an epoch or of
      a validation: a run that goes on from there is the run that was not cut, if its loader keeps its place.
    - In a folder that was copied or moved the best score is known.

    Args:
        arguments: those of ``ModelCheckpoint``.

    Attributes:
        best_metrics: last values of everything that was logged until the best checkpoint was written.
        best_at: step and epoch at which that was.

    Example:
        >>> Checkpoint(monitor="val/acc", mode="max", save_last=True).best_metrics
        {}
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.best_metrics: dict[str, float] = {}
        self.best_at: dict[str, int] = {}
        self._logged: dict[str, float] = {}  # also before the run was cut

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let files be renamed when they are whole."""
        with warnings.catch_warnings():
            # it is that of the run that goes on
            warnings.filterwarnings("ignore", ".*exists and is not empty")
            super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = _WholeFiles()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the loader find its place: Lightning forgets it where a scheduler asked for the number of steps."""
        super().on_train_start(trainer, pl_module)
        trainer.fit_loop._load_combined_loader_states()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget that the run was cut in an earlier start of this validation."""
        progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        if trainer.state.fn == TrainerFn.FITTING and progress.total.started != progress.total.completed:
            progress.total.reset()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the best checkpoint if this is it, and the last one."""
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._save_last_unless_saved(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the best checkpoint if this is it, and the last one."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._save_last_unless_saved(trainer)

    def _save_last_unless_saved(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the last checkpoint if a signal ends the run, at the end of a batch."""
        super().on_exception(trainer, pl_module, exception)
        if not isinstance(exception, SIGTERMException) or trainer.state.fn != TrainerFn.FITTING:
            return
        if self._should_skip_saving_checkpoint(trainer):
            return
        if trainer.validating:  # it starts again, with all its batches, as if it had been cut in the first one
            progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset()
            for numbers in (progress.total, progress.current):
                numbers.ready = numbers.started = 1
        elif not all(hasattr(loader, "state_dict") for loader in _loaders(trainer)):
            rank_zero_info("The loader does not keep its place: a resumed run goes on from the last validation.")
            return
        self._save_last_unless_saved(trainer)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self._logged |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        if filepath == self.best_model_path:
            self.best_metrics = dict(self._logged)
            self.best_at = {"step": trainer.global_step, "epoch": trainer.current_epoch}
        super()._save_checkpoint(trainer, filepath)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of ``ModelCheckpoint``, and what was logged."""
        own = {"best_metrics": self.best_metrics, "best_at": self.best_at, "logged": self._logged}
        return super().state_dict() | own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load it, with paths as they are where the folder is now."""
        self.best_metrics, self._logged = state_dict.get("best_metrics", {}), state_dict.get("logged", {})
        self.best_at = state_dict.get("best_at", {})
        super().load_state_dict(moved(state_dict, str(state_dict.get("dirpath")), str(self.dirpath)))


def _loaders(trainer: Trainer) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined.flattened


def moved(value: Any, source: str, target: str) -> Any:
    """Return the state of a callback with one folder in place of another in all its paths.

    Example:
        >>> moved({"path": "/a/best.ckpt", "scores": {"/a/best.ckpt": 0.5}, "mode": "max"}, "/a", "/b")
        {'path': '/b/best.ckpt', 'scores': {'/b/best.ckpt': 0.5}, 'mode': 'max'}
    """
    if isinstance(value, Mapping):
        return {moved(key, source, target): moved(each, source, target) for key, each in value.items()}
    if isinstance(value, str) and (value == source or value.startswith(f"{source}{os.sep}")):
        return target + value[len(source) :]
    return value


class _WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it; in memory first, so that a full disk is named as such."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        part = place.with_name(f"{place.name}.part")
        try:
            part.write_bytes(content.getbuffer())
            part.replace(place)
        finally:
            part.unlink(missing_ok=True)
