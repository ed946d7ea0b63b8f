"""The second pass of gradient="average" leaves nothing behind but its gradient and the statistics of batch norms."""

import torch
from networks import Project, equal_states, loader, state, trainer

from bnnft.callbacks import BitFlipTraining


class Keeping(Project):
    """Counts and collects in its training step."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.losses, self.generator = [], torch.Generator().manual_seed(1)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen += len(batch[0])
        self.losses.append(loss.detach())
        self.drawn = torch.rand(1, generator=self.generator)
        return loss


def fit(tmp_path, gradient):
    module = Keeping()
    trainer(tmp_path, [BitFlipTraining(0.2, gradient=gradient)], max_epochs=1).fit(module, loader())
    return module


def test_what_a_step_keeps_is_of_one_pass(tmp_path):
    average, plain = fit(tmp_path, "average"), fit(tmp_path, "straight_through")
    assert average.seen == plain.seen == 48
    assert len(average.losses) == len(plain.losses) == 6
    assert torch.equal(average.drawn, plain.drawn)
    assert not equal_states(state(average), state(plain))
    assert average.net[1].num_batches_tracked == 2 * plain.net[1].num_batches_tracked
