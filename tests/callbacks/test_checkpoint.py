import errno
import shutil
import signal
from pathlib import Path

import pytest
import torch
from lightning import Callback
from networks import Project, loader, small_data, small_net, state, trainer

from bnnft.callbacks import BitFlipTraining, Checkpoint, ToleranceMetrics
from bnnft.dataset.in_memory import ResumableLoader, ShuffledByEpoch

BATCHES = 6


class Stop(Callback):
    """SIGTERM at one place: in a batch of training, or of validation, of this number."""

    def __init__(self, place=None):
        self.place = place
        self.training = self.validation = 0

    def on_before_backward(self, *_):
        self.training += 1
        self.at("training", self.training)

    def on_validation_batch_end(self, *_):
        self.validation += 1
        self.at("validation", self.validation)

    def at(self, *place):
        if place == self.place:
            signal.raise_signal(signal.SIGTERM)


class Scheduled(Project):
    """Its optimizers ask for the number of steps, so that the loader is made before the checkpoint is read."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(folder, place=None, data=None, epochs=3, **options):
    """Train for three epochs of six batches, from where ``last.ckpt`` is."""
    if data is None:
        samples = small_data()
        data = ResumableLoader(samples, batch_size=8, sampler=ShuffledByEpoch(len(samples), seed=5))
    checkpoint = Checkpoint(folder, filename="best", monitor="val/loss", save_last=True, enable_version_counter=False)
    last = Path(folder, "last.ckpt")
    module = Scheduled(small_net(9 if last.exists() else 0))
    stop = Stop(place)
    options = {"num_sanity_val_steps": 0} | options
    fit = trainer(
        folder,
        [BitFlipTraining(0.1), ToleranceMetrics(), checkpoint, stop],
        max_epochs=epochs,
        enable_checkpointing=True,
        **options,
    )
    fit.fit(module, data, loader(), ckpt_path=last if last.exists() else None)
    return module, checkpoint, stop


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    return train(tmp_path_factory.mktemp("uncut"))


PLACES = [("training", number) for number in (1, 4, BATCHES, BATCHES + 1, 2 * BATCHES + 3, 3 * BATCHES)]
PLACES += [("validation", number) for number in (1, 3, BATCHES, BATCHES + 2, 3 * BATCHES - 1, 3 * BATCHES)]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0]}{place[1]}")
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(uncut, tmp_path, place):
    """In the middle of an epoch and of a validation too; and no batch of training is run twice."""
    with pytest.raises(SystemExit):
        train(tmp_path, place)
    module, checkpoint, stop = train(tmp_path)
    expected, same, _ = uncut
    assert all(torch.equal(value, state(expected)[name]) for name, value in state(module).items())
    assert checkpoint.best_model_score == same.best_model_score
    assert checkpoint.best_metrics == same.best_metrics
    done = place[1] if place[0] == "training" else BATCHES * -(-place[1] // BATCHES)
    assert stop.training == 3 * BATCHES - done
    for name in ("best", "last"):
        ours, theirs = (
            torch.load(Path(each.dirpath, f"{name}.ckpt"), weights_only=False) for each in (checkpoint, same)
        )
        assert (ours["epoch"], ours["global_step"]) == (theirs["epoch"], theirs["global_step"])
        assert all(torch.equal(value, theirs["state_dict"][key]) for key, value in ours["state_dict"].items())


def test_a_run_that_is_stopped_in_one_of_several_validations_of_an_epoch(tmp_path):
    whole, _, _ = train(tmp_path / "whole", val_check_interval=2)
    with pytest.raises(SystemExit):
        train(tmp_path / "cut", ("validation", 2 * BATCHES - 2), val_check_interval=2)
    module, _, stop = train(tmp_path / "cut", val_check_interval=2)
    assert stop.training == 3 * BATCHES - 4
    assert all(torch.equal(value, state(whole)[name]) for name, value in state(module).items())


def test_where_a_loader_does_not_keep_its_place_the_last_epoch_counts(tmp_path):
    """Otherwise some batches would be trained twice, and others not at all."""
    whole, _, _ = train(tmp_path / "whole", data=loader())
    with pytest.raises(SystemExit):
        train(tmp_path / "cut", ("training", BATCHES + 2), data=loader())
    module, _, stop = train(tmp_path / "cut", data=loader())
    assert stop.training == 2 * BATCHES
    assert all(torch.equal(value, state(whole)[name]) for name, value in state(module).items())


def test_a_folder_that_was_moved_keeps_its_best_score(tmp_path, uncut):
    with pytest.raises(SystemExit):
        train(tmp_path / "here", ("training", 2 * BATCHES + 1))
    shutil.move(tmp_path / "here", tmp_path / "there")
    _, checkpoint, _ = train(tmp_path / "there")
    assert checkpoint.best_model_path == str(tmp_path / "there" / "best.ckpt")
    assert checkpoint.best_model_score == uncut[1].best_model_score
    assert checkpoint.best_metrics == uncut[1].best_metrics
    assert not (tmp_path / "here").exists()


def test_a_full_disk_is_named_and_what_was_written_stays(tmp_path, monkeypatch):
    train(tmp_path, epochs=1)
    written = {path.name: path.read_bytes() for path in tmp_path.glob("*.ckpt")}

    def full(path, content):
        with path.open("wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        train(tmp_path, epochs=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written
