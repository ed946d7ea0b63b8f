"""What the tests of other people's libraries share: a project that notes its bits in each step, and a plain loop."""

from contextlib import ExitStack

import torch
from by_hand import by_hand
from networks import Project, equal_states, loader, state, trainer

from bnnft import flipped
from bnnft.ber import Independent, Key
from bnnft.callbacks import BitFlipTraining
from bnnft.injection.activation import find_activations
from bnnft.injection.flipped import TurnedBits, draw_flips
from bnnft.injection.sites import find_sites

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


def exactly_the_drawn_bits(folder, net, binarized):
    """Tell whether at a learning rate of 0 the signs of each step are the clean ones, but for the drawn bits."""
    module = Noting(net, binarized, lr=0.0)
    trainer(folder, [BitFlipTraining(RATE)]).fit(module, loader())
    clean = [weight.sign().reshape(-1) for weight in module.binarized(module.net)]
    for step, signs in enumerate(module.signs):
        for before, now, indices in zip(clean, signs, drawn(module, step), strict=True):
            if not torch.equal((before != now).nonzero().squeeze(1), indices):
                return False
    return len(module.signs) > 1


def trains_as_by_hand(folder, nets, how="latent"):
    """Train two equal networks, one by the callback and one in a plain loop, and tell whether they end bit-equal."""
    ours, reference = map(Project, nets)
    trainer(folder, [BitFlipTraining(RATE, how=how)]).fit(ours, loader())
    return equal_states(state(ours), state(by_hand(RATE, reference)))


def check_zeros(layer, bits):
    """All bits of a layer turn, those of zeros of both signs too, and every float comes back as it was."""
    with torch.no_grad():
        layer.weight[:, ::2] = 0.0
        layer.weight[:, ::4] = -0.0
    before, clean = layer.weight.detach().clone(), bits().detach()
    turned = TurnedBits(find_sites(layer), {"weight": torch.arange(before.numel())})
    assert torch.equal(bits(), -clean)
    turned.restore()
    assert torch.equal(layer.weight.view(torch.int32), before.view(torch.int32))


def flips_activations(tmp_path, net, names):
    """Train with flips of the activations, which are found, and check that they put out the other value at rate 1."""
    assert find_activations(net) == names
    clean, wrong = [], []
    for seen, rate in ((clean, 0.0), (wrong, 1.0)):
        with ExitStack() as stack:
            stack.enter_context(flipped(net.eval(), rate, target="activations"))
            for name in names:
                hook = net.get_submodule(name).register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
                stack.callback(hook.remove)
            net(torch.randn(6, 12, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(wrong[0], clean[0].max() + clean[0].min() - clean[0])
    module = Project(net.train())
    trainer(tmp_path, [BitFlipTraining(0.2, target="both")]).fit(module, loader())
    return True
