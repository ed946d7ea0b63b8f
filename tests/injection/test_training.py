"""Training under flips in any loop: what is found, drawn, proven and restored, batch by batch."""

import copy

import patterns
import pytest
import torch
import torch.nn.functional as F
from binarized import Kernel, Linear
from binarizers import WIDTH, ste
from networks import Project, equal_states, loader, small_net, state, trainer
from torch import nn
from torch.utils.checkpoint import checkpoint
from uses import Seen

from bnnft.ber import Independent, Key
from bnnft.ber.schedule import Linear as LinearSchedule
from bnnft.callbacks import BitFlipTraining
from bnnft.injection.training import BitFlips
from bnnft.nn import BinaryLinear


def batches(count, seed=0, size=6):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, WIDTH, generator=generator) for _ in range(count)]


def train(training, data, optimizer=None, loss=None):
    """Return the model's outputs in a plain loop."""
    outputs = []
    for x in data:
        with training.batch():
            output = training.model(x)
            outputs.append(output.detach().clone())
            (output.square().mean() if loss is None else loss(output)).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    return outputs


def names(training):
    return [site.name for site in training.injection.sites]


def foreign_net():
    torch.manual_seed(0)
    layers = patterns.Centred(12, 16), patterns.SignFunction(16, 16)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), nn.Linear(16, 3))


NETS = {"own layers": small_net, "others": foreign_net}


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
@pytest.mark.parametrize("gradient", ["straight_through", "exact"])
def test_a_plain_loop_gives_the_weights_of_the_callback_bit_for_bit(tmp_path, net, gradient):
    """Twelve batches, six in an epoch."""
    module = Project(net())
    callback = BitFlipTraining(0.1, seed=3, gradient=gradient)
    trainer(tmp_path, [callback]).fit(module, loader())
    plain = Project(net()).train()
    training, optimizer = BitFlips(plain, 0.1, seed=3, gradient=gradient), plain.configure_optimizers()
    for _ in range(2):
        for x, y in loader():
            with training.batch():
                optimizer.zero_grad()
                F.cross_entropy(plain(x), y).backward()
                optimizer.step()
        training.look_again()
    assert equal_states(state(plain), state(module))
    assert training.batches == callback.training.batches == 12
    assert names(training) == names(callback.training) != []


def test_each_batch_has_the_flips_of_its_number_and_nothing_is_left_between():
    """In the first batch of a layer that is not known there are none."""
    torch.manual_seed(0)
    model = Linear(bias=False)
    training, signs = BitFlips(model, 0.2, seed=5), ste(model.weight).detach()
    for number, x in enumerate(batches(4)):
        with training.batch():
            output = model(x)
        flips = Independent(0.2).flips(model.weight, Key(5, number, 0, purpose="training")) if number else []
        expected = signs.clone()
        expected.view(-1)[flips] *= -1
        assert torch.allclose(output, F.linear(x, expected), atol=1e-5)
        assert torch.allclose(model(x), F.linear(x, signs), atol=1e-5)


def test_own_layers_have_flips_in_the_first_batch():
    model = small_net(inputs=WIDTH).eval()
    (x,) = batches(1)
    clean = model(x)
    with BitFlips(model, 0.3).batch():
        assert not torch.equal(model(x), clean)
    assert torch.equal(model(x), clean)


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_a_run_that_is_resumed_is_the_uncut_one(net):
    torch.manual_seed(1)
    data = [torch.randn(8, 12) for _ in range(8)]
    model = net()
    training, optimizer = BitFlips(model, 0.1, seed=1), torch.optim.Adam(model.parameters(), 0.01)
    train(training, data[:4], optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), training.state_dict()))
    train(training, data[4:], optimizer)
    again = net()
    resumed, other = BitFlips(again, 0.1, seed=1), torch.optim.Adam(again.parameters(), 0.01)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    train(resumed, data[4:], other)
    assert equal_states(state(again), state(model))


def test_a_resume_into_another_model_is_an_error():
    training = BitFlips(Linear(), 0.1)
    train(training, batches(2))
    with pytest.raises(ValueError, match="the checkpoint has flips in weight, but Sequential has no such parameters"):
        BitFlips(nn.Sequential(Linear()), 0.1).load_state_dict(training.state_dict())


def test_a_batch_that_fails_restores_and_does_not_count():
    model = small_net(inputs=WIDTH).eval()
    training, (x,) = BitFlips(model, 0.3), batches(1)
    clean, outputs = model(x), []

    def fails():
        outputs.append(model(x))
        return 1 / 0

    with pytest.raises(ZeroDivisionError), training.batch():
        fails()
    (flipped,) = outputs
    assert not torch.equal(flipped, clean)
    assert torch.equal(model(x), clean)
    assert training.batches == 0
    with training.batch():
        assert torch.equal(model(x), flipped)
    assert training.batches == 1


def operands(seen):
    return [call[1] for name, call in zip(seen.names, seen.calls, strict=True) if name == "linear"]


def test_a_module_that_has_no_bits_is_an_error_after_its_first_batch():
    training = BitFlips(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2)), 0.1)
    with pytest.raises(ValueError, match="Sequential has no binarized weights"):
        train(training, batches(1))


def test_what_is_binary_and_has_no_owner_is_named_once():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Linear()
            self.register_buffer("signs", torch.randn(WIDTH, WIDTH).sign())

        def forward(self, x):
            return F.linear(self.a(x), self.signs)

    said = []
    training = BitFlips(Fixed(), 0.1, warn=said.append)
    train(training, batches(4))
    assert len(said) == 1
    assert f"the model ({WIDTH}, {WIDTH})" in said[0]


def test_it_says_once_what_is_flipped_where():
    said = []
    training = BitFlips(nn.Sequential(BinaryLinear(WIDTH, WIDTH), Linear()), 0.1, say=said.append)
    train(training, batches(8))
    text = " ".join(said)
    assert "1.weight (found, made)" in text
    assert len(said) == len(set(said))
    assert all(site.like_latent for site in training.injection.sites)


def test_the_rate_follows_its_schedule():
    torch.manual_seed(0)
    model = Linear(bias=False)
    training, shares, clean = BitFlips(model, 0.5, schedule=LinearSchedule(10)), [], ste(model.weight).detach()
    for x in batches(12):
        with training.batch(), (seen := Seen()):
            model(x)
        shares.append(float((operands(seen)[0] * clean < 0).float().mean()))
    assert shares[0] == 0  # and the layer is found
    for batch, share in enumerate(shares[1:], 1):
        expected = 0.5 * LinearSchedule(10).factor(batch, 0)
        assert abs(share - expected) < 5 * (0.25 / WIDTH**2) ** 0.5  # five deviations: a false alarm in 10^6


def test_activation_checkpointing_with_a_function_of_ones_own_trains_alike():
    """See also the tests of the operand."""

    def product(x, w):
        return F.linear(x, ste(w))

    plain = Kernel((WIDTH, WIDTH), product)
    model = Kernel((WIDTH, WIDTH), lambda x, w: checkpoint(product, x, w, use_reentrant=False))
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):
        train(BitFlips(each, 0.2), batches(5), torch.optim.SGD(each.parameters(), 0.1))
    assert equal_states(state(model), state(plain))
