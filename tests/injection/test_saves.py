"""Whatever is saved while bits are flipped holds clean weights, under the model's own names."""

import copy
import io
import os
import pickle
import signal

import pytest
import torch
from latents import (
    batches,
    binary_layers,
    bits,
    copied_state,
    differing,
    draw,
    equal_states,
    network,
    same_flips,
    sites,
)
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from bnnft.injection.latent import LatentFlips
from bnnft.nn import BinaryLinear


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def in_a_part(model):
    """The state dicts of the parts by themselves, put together."""
    return {f"{name}.{key}": value for name, part in model.named_children() for key, value in part.state_dict().items()}


def by_a_signal(model):
    """The state dict that a signal handler sees."""
    states = []
    previous = signal.signal(signal.SIGUSR1, lambda *args: states.append(copied_state(model)))
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, previous)
    return states[0]


SAVES = {
    "state dict": lambda model: model.state_dict(),
    "state dict with variables": lambda model: model.state_dict(keep_vars=True),
    "state dicts of the parts": in_a_part,
    "state dict into another": lambda model: model.state_dict(destination={}),
    "deep copy": lambda model: copy.deepcopy(model).state_dict(),
    "deep copy of parts": lambda model: nn.Sequential(*map(copy.deepcopy, model)).state_dict(),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)).state_dict(),
    "torch.save of the module": lambda model: through_torch(model).state_dict(),
    "torch.save of the state": lambda model: through_torch(model.state_dict()),
    "torch.save of parameters": lambda model: through_torch({**model.state_dict(), **dict(model.named_parameters())}),
    "signal handler": by_a_signal,
}


@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize("save", SAVES)
def test_what_is_saved_in_a_window_is_clean_and_the_model_stays_flipped(save, evaluation):
    model, flips, (x, y) = network(), draw(network()), batches(1)[0]
    clean, before = copied_state(model), bits(model)
    with torch.set_grad_enabled(not evaluation), LatentFlips(model, sites(model), flips):
        output = model(x)
        assert same_flips(differing(model, before), flips)
        saved = SAVES[save](model)
        assert saved.keys() == clean.keys()
        statistics = [name for name in clean if "running" in name or "num_batches" in name]
        assert equal_states({**saved, **dict.fromkeys(statistics, x)}, {**clean, **dict.fromkeys(statistics, x)})
        assert same_flips(differing(model, before), flips)
        if not evaluation:
            nn.functional.cross_entropy(output, y).backward()
            assert equal_states(bits(model), before)
    assert equal_states(bits(model), before)


@pytest.mark.parametrize("make", [copy.deepcopy, through_torch], ids=["deep copy", "torch.save"])
def test_a_copy_is_a_model_of_its_own(make):
    """It trains as a copy made outside does, flips nothing, and keeps no hook once it has run."""
    model, (x, y) = network(BinaryLinear), batches(1)[0]
    model[0].weight.remark = "kept"
    outside = copy.deepcopy(model)
    with LatentFlips(model, sites(model), draw(model)):
        model(x)
        inside = make(model)
        assert inside[0].weight is not model[0].weight
        assert inside[0].weight.requires_grad
        inside.load_state_dict(outside.state_dict())
        for copied in (inside, outside):
            nn.functional.cross_entropy(copied(x), y).backward()
            torch.optim.SGD(copied.parameters(), 0.1).step()
        assert equal_states(copied_state(inside), copied_state(outside))
    for module in inside.modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._state_dict_hooks)
        assert not any(hooks)
    assert not any(name in vars(weight) for weight in inside.parameters() for name in ("__deepcopy__", "__reduce_ex__"))
    assert getattr(inside[0].weight, "remark", None) == ("kept" if make is through_torch else None)


def test_tied_weights_are_tied_in_a_copy_and_clean_under_both_names():
    model = nn.Sequential(BinaryLinear(6, 6, bias=False), BinaryLinear(6, 6, bias=False))
    model[1].weight = model[0].weight
    clean = copied_state(model)
    with torch.no_grad(), LatentFlips(model, sites(model)[:1], {"0.weight": torch.arange(0, 36, 2)}):
        assert not torch.equal(model[1].weight, clean["1.weight"])
        assert equal_states(model.state_dict(), clean)
        for copied in (copy.deepcopy(model), through_torch(model)):
            assert copied[0].weight is copied[1].weight
            assert equal_states(copied.state_dict(), clean)


def test_a_parametrized_weight_is_saved_clean():
    model = nn.Sequential(weight_norm(nn.Linear(4, 3)))
    name = "0.parametrizations.weight.original1"
    weight = model.get_parameter(name)
    clean, flips = weight.detach().clone(), {name: torch.arange(0, 12, 2)}
    site = sites(network())[0]._replace(name=name, weight=weight)
    with torch.no_grad(), LatentFlips(model, [site], flips):
        assert not torch.equal(weight, clean)
        assert torch.equal(model.state_dict()[name], clean)


def test_several_contexts_leave_a_state_dict_clean_until_the_last_is_left():
    model = network()
    clean = copied_state(model)
    with torch.no_grad(), LatentFlips(model, sites(model), draw(model, 1)):
        once = bits(model)
        with LatentFlips(model, sites(model), draw(model, 2)):
            assert not equal_states(bits(model), once)
            assert equal_states(model.state_dict(), clean)
        assert equal_states(bits(model), once)
        assert equal_states(model.state_dict(), clean)
    assert equal_states(model.state_dict(), clean)
    assert model.state_dict()["0.weight"].data_ptr() == model[0].weight.data_ptr()


def test_a_state_dict_of_clean_weights_shares_their_memory_as_ever():
    model = network()
    with LatentFlips(model, sites(model), draw(model)):
        assert model.state_dict()["0.weight"].data_ptr() == model[0].weight.data_ptr()
        model(batches(1)[0][0])
        assert model.state_dict()["0.weight"].data_ptr() != model[0].weight.data_ptr()


def test_zeros_are_saved_as_zeros():
    layer = BinaryLinear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight[0] = 0.0
    clean = layer.weight.detach().clone()
    site = sites(layer)[0]._replace(zero=1)
    with torch.no_grad(), LatentFlips(layer, [site], {"weight": torch.arange(8)}):
        assert (layer.weight != clean).all()
        assert torch.equal(layer.state_dict()["weight"], clean)
        assert torch.equal(copy.deepcopy(layer).weight, clean)


def test_nothing_is_left_on_a_weight_after_the_context():
    model = network()
    with LatentFlips(model, sites(model), draw(model)):
        assert "__deepcopy__" in vars(model[0].weight)
        model(batches(1)[0][0])
    for layer in binary_layers(model):
        assert not vars(layer.weight)
        assert not layer.weight._backward_hooks
