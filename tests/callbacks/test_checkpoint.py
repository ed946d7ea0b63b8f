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


def train(folder, place=None, data=None, epochs=3, **options):
    """Train for three epochs of six batches, from where ``last.ckpt`` is."""
    if data is None:
        samples = small_data()
        data = ResumableLoader(samples, batch_size=8, sampler=ShuffledByEpoch(len(samples), seed=5))
    checkpoint = Checkpoint(folder, filename="best", monitor="val/loss", save_last=True, enable_version_counter=False)
    last = Path(folder, "last.ckpt")
    module = Project(small_net(9 if last.exists() else 0))
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
