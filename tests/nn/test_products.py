"""Products in integers are those in float, to the last bit, in value and gradient, wherever they are used."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import bnnft
from bnnft.ber import Independent, Key
from bnnft.injection.injection import draw_flips
from bnnft.injection.layer import LayerFlips
from bnnft.injection.sites import find_sites
from bnnft.injection.training import BitFlips
from bnnft.model import FC, VGG3
from bnnft.nn import BinaryConv2d, BinaryLinear, integers

INPUTS = ("signs", "zeros and ones", "int8", "dyadic", "digits", "large", "real", "one real", "nan", "inf", "zeros")
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def small_products_too(monkeypatch):
    for name, least in {"_LEAST_PRODUCTS": 1, "_LEAST_PER_VALUE": 1}.items():
        monkeypatch.setattr(integers, name, least)
    monkeypatch.setattr(integers, "_CHUNK", 397)


@pytest.fixture(autouse=True)
def used(monkeypatch):
    """The operators that ran, and gave what float gives: a test of what never ran would show nothing."""
    monkeypatch.setattr(integers, "_equal", {})
    yield integers._equal
    assert all(integers._equal.values())


def inputs(kind, shape, generator):
    whole = torch.randint(-128, 128, shape, generator=generator).float()
    made = {
        "signs": lambda: whole.sign() + (whole == 0),
        "zeros and ones": lambda: (whole > 0).float(),
        "int8": lambda: whole,
        "dyadic": lambda: whole / 128,
        "digits": lambda: (whole.abs() % 17) / 8 - 1,
        "large": lambda: whole * 2.0**20,
        "real": lambda: torch.randn(shape, generator=generator),
        "one real": lambda: whole.sign() + (torch.arange(whole.numel()).view(shape) == whole.numel() - 1) / 3,
        "nan": lambda: torch.where(whole == whole.flatten()[:1].sum(), torch.nan, whole),
        "inf": lambda: torch.where(whole == whole.flatten()[:1].sum(), torch.inf, whole),
        "zeros": lambda: -0.0 * whole.abs(),
    }
    return made[kind]()


def same_bits(a, b):
    """Whether tensors are equal in every bit, the signs of zeros and the order in memory too; NaN are all alike."""
    if a is None or b is None:
        return a is b
    order = [size != 1 for size in a.shape]
    strides = [list(itertools.compress(x.stride(), order)) for x in (a, b)]
    equal = (a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())
    return (
        a.dtype == b.dtype and a.shape == b.shape and (a.numel() == 0 or strides[0] == strides[1]) and bool(equal.all())
    )


def in_float(function, *args):
    kept = set(integers.devices)
    integers.devices.clear()
    try:
        return function(*args)
    finally:
        integers.devices.update(kept)


def outcome(layer, x):
    """Output, gradients, and gradients of gradients of a layer."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    output = layer(x)
    learned = [x, *layer.parameters()]
    upstream = torch.arange(output.numel(), dtype=output.dtype).view(output.shape).sin()
    found = torch.autograd.grad(output, learned, upstream.requires_grad_(), create_graph=True)
    twice = torch.autograd.grad(sum(each.square().sum() for each in found), [upstream, x], allow_unused=True)
    return [output.detach(), *found, *twice]


def assert_same(layer, x):
    actual, expected = outcome(layer, x), in_float(outcome, layer, x)
    assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(INPUTS),
    leading=st.lists(st.integers(0, 9), max_size=2),
    features=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    bias=st.sampled_from([None, "real", "on the grid"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    seed=seeds,
)
def test_linear_is_equal_in_every_bit(kind, leading, features, bias, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = BinaryLinear(*features, bias=bias is not None)
    nn.init.normal_(layer.weight, generator=generator)
    if bias is not None:
        nn.init.normal_(layer.bias, generator=generator)
    if bias == "on the grid":
        layer.bias.data.mul_(8).round_()
    x = inputs(kind, (*leading, features[0]), generator)
    assert_same(layer.to(dtype), x.to(dtype))


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    padding = draw(st.one_of(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.sampled_from(["same", "valid"])))
    stride = (1, 1) if padding == "same" else draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    return {
        "in_channels": groups * draw(st.integers(1, 5)),
        "out_channels": groups * draw(st.integers(1, 5)),
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])),
    }


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(INPUTS),
    options=convolutions(),
    size=st.tuples(st.integers(7, 10), st.integers(7, 10)),
    batch=st.sampled_from([None, 0, 1, 2, 5]),
    form=st.sampled_from(["contiguous", "channels last", "weight channels last"]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]),
    whole_bias=st.booleans(),
    seed=seeds,
)
def test_convolution_is_equal_in_every_bit(kind, options, size, batch, form, dtype, whole_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = BinaryConv2d(**options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=generator)
    if whole_bias and layer.bias is not None:
        layer.bias.data.mul_(8).round_()
    x = inputs(kind, (*([] if batch is None else [batch]), options["in_channels"], *size), generator).to(dtype)
    if form == "channels last" and batch is not None:
        x = x.contiguous(memory_format=torch.channels_last)
    if form == "weight channels last":
        layer = layer.to(memory_format=torch.channels_last)
    assert_same(layer.to(dtype), x)


def network(build):
    torch.manual_seed(0)
    return build()


NETWORKS = {"FC": lambda: FC((1, 8, 8), 10, widths=[48, 32]), "VGG3": lambda: VGG3((1, 8, 8), 10, channels=4, width=16)}
every_network = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)


def trained(build, rate, gradient="straight_through", steps=50):
    """Losses and weights of a training on pixels."""
    model, generator = network(build), torch.Generator().manual_seed(0)
    images, classes = pixels(40, generator), torch.randint(10, (40,), generator=generator)
    training, optimizer, losses = BitFlips(model, rate, gradient=gradient), torch.optim.Adam(model.parameters()), []
    for step in range(steps):
        with training.batch():
            loss = F.cross_entropy(model(images[step % 2 :: 2]), classes[step % 2 :: 2])
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


def pixels(number, generator):
    return (torch.randint(256, (number, 1, 8, 8), generator=generator).float() - 128) / 128


def assert_equal_states(a, b):
    assert all(torch.equal(a[name], b[name]) for name in a | b)


@every_network
@pytest.mark.parametrize(("rate", "gradient"), [(0.0, "straight_through"), (0.1, "straight_through"), (0.3, "exact")])
def test_trainings_have_equal_losses_and_weights(build, rate, gradient, used):
    losses, weights = trained(build, rate, gradient)
    assert used
    expected_losses, expected_weights = in_float(trained, build, rate, gradient)
    assert losses == expected_losses
    assert_equal_states(weights, expected_weights)


def scores(build, threads):
    """Scores under flips of every layer, and an accuracy over BER."""
    torch.set_num_threads(threads)
    try:
        model, x = network(build).eval(), pixels(60, torch.Generator().manual_seed(0))
        sites, found = find_sites(model), []
        for rate in (0.0, 0.1, 0.3):
            with torch.no_grad(), LayerFlips(model, sites, draw_flips(sites, Independent(rate), Key(1))):
                found.append(model(x))
        data = [(x, found[0].argmax(1))]
        return [*found, bnnft.accuracy_over_ber(model, data, rates=[0, 0.01, 0.1], maps=3, seed=0).accuracy]
    finally:
        torch.set_num_threads(1)


@every_network
def test_scores_and_curves_are_equal_for_one_and_two_threads_and_in_float(build, used):
    one, two = scores(build, 1), scores(build, 2)
    assert used
    for other in (two, in_float(scores, build, 1)):
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], one[1])


def layer_and_input():
    torch.manual_seed(0)
    return BinaryLinear(24, 16, bias=False), torch.randn(20, 24).sign()


def watched(context):
    def run(layer, x):
        with context():
            return layer(x).clone()  # of what was made in inference mode

    return run


def dual(layer, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).tangent


SURROUNDINGS = {
    "vmap": lambda layer, x: torch.func.vmap(layer)(x),
    "grad": lambda layer, x: torch.func.grad(lambda x: layer(x).square().sum())(x),
    "jacrev": lambda layer, x: torch.func.jacrev(layer)(x),
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x,))[1],
    "forward mode": dual,
    "compile": lambda layer, x: torch.compile(layer, backend="eager", fullgraph=True)(x),
    "export": lambda layer, x: torch.export.export(layer, (x,)).module()(x),
    "jit": lambda layer, x: torch.jit.trace(layer, (x,))(x),
    "function mode": watched(BaseTorchFunctionMode),
    "dispatch mode": watched(lambda: FlopCounterMode(display=False)),
    "autocast": watched(lambda: torch.autocast("cpu", torch.bfloat16)),
    "inference mode": watched(torch.inference_mode),
    "functional call": lambda layer, x: torch.func.functional_call(layer, dict(layer.named_parameters()), (x,)),
    "checkpoint": lambda layer, x: checkpoint(layer, x.requires_grad_(), use_reentrant=False),
    "copy": lambda layer, x: copy.deepcopy((layer(x), layer)[1])(x),
    "in place": lambda layer, x: F.relu_(layer(x)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("run", SURROUNDINGS.values(), ids=SURROUNDINGS)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_whatever_runs_a_layer_sees_no_difference(run, kind):
    layer, x = layer_and_input()
    if kind == "convolution":
        layer, x = BinaryConv2d(4, 6, 3, padding="same", stride=1, bias=False), x.view(5, 4, 4, 6)
    torch.compiler.reset()
    actual, expected = run(layer, x), in_float(run, layer, x)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


class Names(TorchFunctionMode):
    """Names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_who_watches_operations_sees_the_product_in_float_with_the_bits(used):
    layer, x = layer_and_input()
    with Names() as names:
        layer(x)
    assert "linear" in names.seen
    assert not used


def test_other_bits_of_a_subclass_are_left_to_float(used):
    class Scaled(BinaryLinear):
        def bits(self):
            return super().bits() / 3

    class ScaledConvolution(BinaryConv2d):
        def bits(self):
            return super().bits() / 3

    x = layer_and_input()[1]
    for layer, images in ((Scaled(24, 16), x), (ScaledConvolution(4, 6, 3, padding=1), x.view(5, 4, 4, 6))):
        assert torch.equal(layer(images), in_float(layer, images))
    assert not used


def test_real_inputs_and_biases_are_left_to_float(used):
    layer, x = layer_and_input()
    layer(x / 3)
    BinaryLinear(24, 16)(x)
    assert not used
    layer(x)
    assert used


def test_sums_that_float_would_round_are_left_to_float(used, monkeypatch):
    monkeypatch.setattr(integers, "_EXACT", 256 * 23)
    layer, x = layer_and_input()
    layer(x)
    assert not used


def test_integers_can_be_switched_off(used, monkeypatch):
    monkeypatch.setattr(integers, "devices", set())
    layer, x = layer_and_input()
    layer(x)
    assert not used


def raising(*args):
    raise RuntimeError("gone")


@pytest.mark.parametrize(
    "changed",
    [raising, lambda a, b: a.int() @ b.int() + 1, lambda a: a],
    ids=["raises", "other values", "other arguments"],
)
def test_an_operator_that_is_gone_or_changed_is_named_once_and_float_goes_on(changed, monkeypatch, used):
    monkeypatch.setattr(torch, "_int_mm", changed)
    layer, x = layer_and_input()
    with pytest.warns(UserWarning, match=r"torch\._int_mm on cpu is of no use .* in float") as warned:
        output = layer(x)
    assert len(warned) == 1
    assert torch.equal(output, in_float(layer, x))
    output.sum().backward()
    assert torch.equal(layer(x), output)  # and says no more
    used.clear()


def test_what_tells_of_modes_may_be_gone_too(monkeypatch, used):
    monkeypatch.delattr(torch._C, "_len_torch_function_stack")
    monkeypatch.setattr(integers, "devices", {"cpu"})
    layer, x = layer_and_input()
    with pytest.warns(UserWarning, match="in float"):
        layer(x)
    layer(x)
    assert not used


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (BinaryLinear(24, 16, bias=False), (20, 48)),
        (BinaryLinear(24, 16, bias=False), (48,)),
        (BinaryConv2d(4, 6, 3, bias=False), (5, 2, 9, 9)),
        (BinaryConv2d(4, 6, 3, bias=False), (5, 4, 2, 2)),
        (BinaryConv2d(4, 6, 3, bias=False), (4, 9)),
    ],
)
def test_a_wrong_shape_is_torchs_error_and_changes_nothing(layer, shape, used):
    with pytest.raises(RuntimeError) as expected:
        in_float(layer, torch.ones(shape))
    with pytest.raises(RuntimeError) as actual:
        layer(torch.ones(shape))
    assert str(actual.value) == str(expected.value)
    assert not used
