"""Layers of ours flip the bits that they make by what they are lent, also in compiled graphs."""

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from networks import small_net
from torch import nn
from uses import mask_of, some_flips

from bnnft.injection.layer import LayerFlips
from bnnft.injection.sites import find_sites
from bnnft.injection.training import BitFlips
from bnnft.nn import BinaryConv2d, BinaryLinear

both_forms = pytest.mark.parametrize("compiled", [False, True], ids=["indices", "masks"])
LAYERS = {
    "linear": (lambda: BinaryLinear(12, 7), (5, 12), F.linear),
    "convolution": (lambda: BinaryConv2d(3, 7, 3), (5, 3, 8, 8), F.conv2d),
    "channels last": (lambda: BinaryConv2d(3, 7, 3).to(memory_format=torch.channels_last), (5, 3, 8, 8), F.conv2d),
    "float64": (lambda: BinaryLinear(12, 7).double(), (5, 12), F.linear),
    "bfloat16": (lambda: BinaryLinear(12, 7).bfloat16(), (5, 12), F.linear),
}
every_layer = pytest.mark.parametrize(("build", "shape", "function"), LAYERS.values(), ids=LAYERS)


def signs(weight, mask):
    """Return the signs of a weight, flipped where a mask says so, as a comparison makes them."""
    ones = torch.ones_like(weight)
    return torch.where((weight < 0) ^ mask, -ones, ones)


def bits_of(weight):
    return weight.detach().clone().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])


@every_layer
@both_forms
@pytest.mark.parametrize("exact", [False, True], ids=["straight-through", "exact"])
def test_exactly_the_drawn_bits_are_flipped_and_the_gradient_passes_or_changes_sign(
    build, shape, function, compiled, exact
):
    torch.manual_seed(0)
    layer = build()
    x = torch.randn(shape, dtype=layer.weight.dtype)
    flips = some_flips(layer, ["weight"])
    mask, before = mask_of(layer, "weight", flips), bits_of(layer.weight)
    with LayerFlips(layer, find_sites(layer), flips, exact=exact, compiled=compiled):
        output = layer(x)
        output.square().sum().backward()
    bits = signs(layer.weight, mask).detach().requires_grad_()
    expected = function(x, bits, layer.bias)
    assert torch.equal(output, expected)
    (gradient,) = torch.autograd.grad(expected.square().sum(), bits)
    assert torch.equal(layer.weight.grad, torch.where(mask & exact, -gradient, gradient))
    assert torch.equal(bits_of(layer.weight), before)
    assert "flips" not in vars(layer)


@both_forms
def test_special_numbers_have_a_bit_too(compiled):
    """Zeros of both signs, infinities and NaN: the sign bit is the bit."""
    layer = BinaryLinear(6, 1, bias=False)
    layer.weight.data = torch.tensor([[0.0, -0.0, torch.inf, -torch.inf, torch.nan, -1e-40]])
    flips = {"weight": torch.tensor([0, 1, 4])}
    with LayerFlips(layer, find_sites(layer), flips, compiled=compiled):
        assert layer.bits().tolist() == [[-1.0, 1.0, 1.0, -1.0, -1.0, -1.0]]
    assert layer.bits().tolist() == [[1.0, -1.0, 1.0, -1.0, 1.0, -1.0]]


@both_forms
def test_flips_within_flips_are_flipped_twice(compiled):
    torch.manual_seed(0)
    layer = BinaryLinear(12, 7)
    sites, some, others = find_sites(layer), some_flips(layer, ["weight"]), some_flips(layer, ["weight"], seed=4)
    masks = [mask_of(layer, "weight", flips) for flips in (some, others)]
    with LayerFlips(layer, sites, some, compiled=compiled):
        with LayerFlips(layer, sites, others, compiled=compiled):
            assert torch.equal(layer.bits(), signs(layer.weight, masks[0] ^ masks[1]))
        assert torch.equal(layer.bits(), signs(layer.weight, masks[0]))
    assert torch.equal(layer.bits(), signs(layer.weight, masks[0] & False))


def test_contexts_may_be_left_in_any_order():
    layer = BinaryLinear(12, 7)
    sites, some, others = find_sites(layer), some_flips(layer, ["weight"]), some_flips(layer, ["weight"], seed=4)
    first, second = LayerFlips(layer, sites, some), LayerFlips(layer, sites, others)
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert torch.equal(layer.bits(), signs(layer.weight, mask_of(layer, "weight", others)))
    second.__exit__()
    assert "flips" not in vars(layer)


def test_a_weight_that_is_tied_is_flipped_in_each_layer_that_has_it():
    first, second = BinaryLinear(12, 12, bias=False), BinaryLinear(12, 12, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    flips = some_flips(model, ["0.weight"])
    with LayerFlips(model, find_sites(model), flips):
        shown = first.bits(), second.bits()
    expected = signs(first.weight, mask_of(model, "0.weight", flips))
    assert all(torch.equal(bits, expected) for bits in shown)


def unpickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled])
@both_forms
def test_copies_that_are_made_inside_are_clean_and_carry_no_flips(copied, compiled):
    model = small_net().eval()
    x, names = torch.randn(4, 12), [site.name for site in find_sites(model)]
    clean, keys = model(x), list(model.state_dict())
    with LayerFlips(model, find_sites(model), some_flips(model, names), compiled=compiled):
        flipped, other = model(x), copied(model)
        assert list(model.state_dict()) == keys
        assert torch.equal(other(x), clean)
    assert not torch.equal(flipped, clean)
    assert not any("flips" in vars(module) for module in other.modules())
    assert torch.equal(model(x), clean)


@pytest.mark.parametrize("gradient", ["straight_through", "exact"])
def test_a_compiled_graph_stays_as_it_is_over_many_batches_and_has_their_flips(gradient):
    """One graph without flips and one with them at most, and the outputs of the same model uncompiled."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    runs = []
    for model in (small_net(), torch.compile(small_net(), backend=counter)):
        training = BitFlips(model, 0.2, gradient=gradient)
        outputs, optimizer = [], torch.optim.SGD(model.parameters(), 0.1)
        for x in torch.randn(12, 8, 12, generator=torch.Generator().manual_seed(1)):
            with training.batch():
                output = model(x)
                output.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            outputs.append(output.detach())
        runs.append(outputs)
    assert 1 <= counter.frame_count <= 2
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*runs, strict=True))


def test_a_compiled_wrapper_of_the_model_runs_with_its_flips():
    """The model itself does not know that it is compiled."""
    plain, inner = small_net(), small_net()
    outer, runs = torch.compile(inner, backend="aot_eager"), []
    for model, forward in ((plain, plain), (inner, outer)):
        training = BitFlips(model, 0.2)
        outputs = []
        for x in torch.randn(5, 8, 12, generator=torch.Generator().manual_seed(1)):
            with training.batch():
                outputs.append(forward(x).detach())
        runs.append(outputs)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*runs, strict=True))
