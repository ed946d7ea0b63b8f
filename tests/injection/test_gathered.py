"""Rates of training are kept beside the statistics that were gathered under them."""

import copy

import pytest
import torch
from networks import Project, loader, small_net, trainer

from bnnft.ber import Asymmetric, ErrorModel, Linear
from bnnft.callbacks import BitFlipTraining
from bnnft.injection.gathered import gathered_at, note, take_down
from bnnft.injection.sites import known_sites
from bnnft.injection.training import BitFlips


class Unknown(ErrorModel):
    def flips(self, weight, key):
        return torch.arange(0, weight.numel(), 3)


def trained(error_model, **options):
    model = small_net()
    training = BitFlips(model, error_model, **options)
    for x, _ in loader():
        with training.batch():
            model(x).square().mean().backward()
    return model, training


@pytest.mark.parametrize(
    ("error_model", "expected"), [(0.1, (0.1, 0.1)), (Asymmetric(0, 0.2), (0.0, 0.2)), (Unknown(), None)], ids=str
)
def test_training_takes_its_rates_down_for_each_weight(error_model, expected):
    model, training = trained(error_model)
    assert gathered_at(model) == {f"{layer}.weight": expected for layer in (0, 3, 6)}
    again = small_net()
    BitFlips(again, error_model).load_state_dict(training.state_dict())
    assert gathered_at(again) == gathered_at(model) == gathered_at(copy.deepcopy(model))


def test_rates_that_move_are_averaged_as_running_statistics_are():
    model, training = trained(0.3, schedule=Linear(steps=6))
    kept = None
    for batch in range(6):
        rate = training.errors.at(batch).rate
        kept = rate if kept is None else kept + 0.1 * (rate - kept)
    assert gathered_at(model)["0.weight"] == pytest.approx((kept, kept))
    assert 0 < kept < 0.3


def test_a_state_dict_has_no_more_names_than_before():
    model = small_net()
    names = list(model.state_dict())
    note(model, known_sites(model), Asymmetric(0, 0.1))
    take_down(model, {"elsewhere.weight": (0.1, 0.1)})
    assert list(model.state_dict()) == names
    assert set(gathered_at(model)) == {"0.weight", "3.weight", "6.weight"}


def test_a_checkpoint_says_it_in_a_test_of_another_process(tmp_path):
    first = trainer(tmp_path, [BitFlipTraining(0.2)], max_epochs=1)
    first.fit(Project(), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    fresh = Project()
    trainer(tmp_path, [BitFlipTraining(0.2)]).test(fresh, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert gathered_at(fresh)["net.0.weight"] == (0.2, 0.2)
