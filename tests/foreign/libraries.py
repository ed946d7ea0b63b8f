"""What the tests of other people's libraries share: a project that notes its bits in each step, and a plain loop."""

import torch
from by_hand import by_hand, drawn
from networks import Project, equal_states, loader, state, trainer
from operands import Operands

from bnnft import binarized_weights, flipped
from bnnft.callbacks import BitFlipTraining
from bnnft.injection.activation import find_activations

RATE = 0.2


class Noting(Project):
    """Notes the signs of what its binarized layers compute with, as ``binarized(net)`` returns them, in each step."""

    def __init__(self, net, binarized, lr=0.01):
        super().__init__(net, lr)
        self.binarized, self.signs = binarized, []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.trainer.training:
            with torch.no_grad():
                self.signs.append([weight.sign().reshape(-1) for weight in self.binarized(self.net)])
        return loss


def exactly_the_drawn_bits(folder, net, binarized, how="auto"):
    """Return whether at a learning rate of 0 the signs of each step are the clean ones, but for the drawn bits."""
    module = Noting(net, binarized, lr=0.0)
    trainer(folder, [BitFlipTraining(RATE, how=how)]).fit(module, loader())
    clean = [weight.sign().reshape(-1) for weight in module.binarized(module.net)]
    names = list(binarized_weights(module))
    for step, signs in enumerate(module.signs):
        wrong = drawn(module, RATE, step, names=names).values()
        for before, now, indices in zip(clean, signs, wrong, strict=True):
            if not torch.equal((before != now).nonzero().squeeze(1), indices):
                return False
    return len(module.signs) > 1


def trains_as_by_hand(folder, nets, how="auto"):
    """Train two equal networks, by the callback and in a plain loop; return whether they end bit-equal."""
    ours, reference = map(Project, nets)
    trainer(folder, [BitFlipTraining(RATE, how=how)]).fit(ours, loader())
    names = list(binarized_weights(reference))
    assert len(names) == 2
    return equal_states(state(ours), state(by_hand(RATE, reference, names=names)))


@torch.no_grad()
def check_zeros(layer, inputs):
    """All bits of a linear layer flip, those of zeros of both signs too, and every float comes back as it was."""

    def bits():
        with Operands() as operands:
            layer(inputs)
        return operands.seen[-1]

    layer.weight[:, ::2] = 0.0
    layer.weight[:, ::4] = -0.0
    before, clean = layer.weight.detach().clone(), bits()
    for how in ("latent", "auto"):
        with flipped(layer, 1.0, how=how):
            assert torch.equal(bits(), -clean)
        assert torch.equal(bits(), clean)
        assert torch.equal(layer.weight.view(torch.int32), before.view(torch.int32))


def flips_activations(tmp_path, net, names):
    """Train with flips of the activations, which are found, and check that they put out the other value at rate 1."""
    assert find_activations(net) == names
    clean, wrong = [], []
    for seen, rate in ((clean, 0.0), (wrong, 1.0)):
        with flipped(net.eval(), rate, target="activations"):
            hooks = [
                net.get_submodule(name).register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
                for name in names
            ]
            net(torch.randn(6, 12, generator=torch.Generator().manual_seed(0)))
        for hook in hooks:
            hook.remove()
    assert torch.equal(wrong[0], clean[0].max() + clean[0].min() - clean[0])
    module = Project(net.train())
    trainer(tmp_path, [BitFlipTraining(0.2, target="both")]).fit(module, loader())
    return True
