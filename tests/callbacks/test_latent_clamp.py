import pytest
from networks import Project, loader, small_net, trainer

from bnnft.callbacks import BitFlipTraining, LatentClamp


def test_latent_weights_stay_in_the_range_and_nothing_else_is_clamped(tmp_path):
    module = Project(lr=0.5)
    trainer(tmp_path, [BitFlipTraining(0.1), LatentClamp(0.3)]).fit(module, loader())
    assert module.net[0].weight.abs().max() <= 0.3
    assert module.net[1].weight.abs().max() > 0.3


def test_only_chosen_weights_are_clamped(tmp_path):
    module = Project(small_net(), lr=0.5)
    trainer(tmp_path, [LatentClamp(0.3, weights=["net.0"])]).fit(module, loader())
    assert module.net[0].weight.abs().max() <= 0.3 < module.net[3].weight.abs().max()


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf")])
def test_the_bound_is_positive(bound):
    with pytest.raises(ValueError, match="bound must be a number greater than 0"):
        LatentClamp(bound)
