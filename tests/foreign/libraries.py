"""What the tests of other people's libraries share: a project that notes its bits in each step, and a plain loop."""

import torch
from networks import Project

from bnnft.ber import Independent, Key
from bnnft.injection import draw_flips
from bnnft.sites import find_sites

RATE = 0.2


class Noting(Project):
    """Notes the signs of what its binarized layers compute with, as ``binarized(net)`` returns them, in each step."""

    def __init__(self, net, binarized, lr=0.01):
        super().__init__(net, lr)
        self.binarized, self.signs = binarized, []

    def training_step(self, batch, batch_idx):
        if self.trainer.training:
            with torch.no_grad():
                self.signs.append([weight.sign().reshape(-1) for weight in self.binarized(self.net)])
        return super().training_step(batch, batch_idx)


def drawn(module, step):
    """Flat indices of the bits that are wrong in a step, a list for each layer."""
    return list(draw_flips(find_sites(module), Independent(RATE), Key(0, step, purpose="training")).values())


def exactly_the_drawn_bits(module):
    """Tell whether the noted signs are the last clean ones, but for the drawn bits: for a learning rate of 0."""
    clean = [weight.sign().reshape(-1) for weight in module.binarized(module.net)]
    for step, signs in enumerate(module.signs):
        for before, now, indices in zip(clean, signs, drawn(module, step), strict=True):
            if not torch.equal((before != now).nonzero().squeeze(1), indices):
                return False
    return len(module.signs) > 1
