import pytest
from networks import Project, equal_states, loader, small_net, state, trainer
from torch import nn

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


def test_every_batch_ends_as_a_step_by_hand_and_a_clamp(tmp_path):
    """Both ends of the range are reached, and a weight that stays within is what the optimizer wrote."""
    ours, reference = Project(lr=0.1), Project(lr=0.1)
    trainer(tmp_path, [LatentClamp(0.25)]).fit(ours, loader())
    optimizer = reference.configure_optimizers()
    reference.train()
    for _ in range(2):
        for x, y in loader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(reference(x), y).backward()
            optimizer.step()
            for layer in (0, 3, 6):
                reference.net[layer].weight.data.clamp_(-0.25, 0.25)
    assert equal_states(state(ours), state(reference))
    weights = ours.net[3].weight
    assert weights.min() == -0.25
    assert weights.max() == 0.25
    assert (weights.abs() < 0.25).any()


def test_the_bound_is_1_unless_told_otherwise(tmp_path):
    module = Project(lr=1.0)
    trainer(tmp_path, [LatentClamp()]).fit(module, loader())
    assert module.net[3].weight.abs().max() == 1.0
