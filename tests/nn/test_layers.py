import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnnft.nn import BinaryActivation, BinaryConv2d, BinaryLinear, Scale, binarize

CONVOLUTIONS = [
    {},
    {"bias": False},
    {"kernel_size": (3, 2)},
    {"stride": 2},
    {"stride": (1, 3), "padding": (2, 1)},
    {"padding": "same"},
    {"dilation": 2},
    {"groups": 2},
    {"groups": 4, "out_channels": 8, "padding": 1, "stride": 2},
    *({"padding": 1, "padding_mode": mode} for mode in ("zeros", "reflect", "replicate", "circular")),
]
every_convolution = pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)


def convolution(options):
    torch.manual_seed(0)
    return BinaryConv2d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options})


def explicit_convolution(layer, images, signs):
    if layer.padding_mode == "zeros":
        return F.conv2d(images, signs, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    (high, wide), mode = layer.padding, layer.padding_mode
    padded = F.pad(images, (wide, wide, high, high), mode=mode)
    return F.conv2d(padded, signs, layer.bias, layer.stride, 0, layer.dilation, layer.groups)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_linear_is_the_linear_map_by_the_signs(bias, shape):
    torch.manual_seed(0)
    layer, x = BinaryLinear(5, 4, bias=bias), torch.randn(shape)
    assert (layer.bias is not None) == bias
    assert torch.equal(layer(x), F.linear(x, layer.weight.sign(), layer.bias))


@every_convolution
def test_convolution_is_the_convolution_with_the_signs(options):
    layer = convolution(options)
    images = torch.randn(2, 4, 9, 8)
    assert torch.equal(layer(images), explicit_convolution(layer, images, layer.weight.sign()))


def test_convolution_takes_one_image_without_a_batch():
    layer, image = convolution({"padding": 1}), torch.randn(4, 9, 8)
    torch.testing.assert_close(layer(image), layer(image[None])[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_float_type_of_the_weight_is_the_type_of_the_result(dtype):
    layer, x = BinaryLinear(5, 4).to(dtype), torch.randn(3, 5).to(dtype)
    assert layer(x).dtype == dtype
    assert torch.equal(layer(x), F.linear(x, layer.weight.sign(), layer.bias))


def test_gradients_of_linear_are_the_explicit_formulas():
    torch.manual_seed(0)
    layer, x = BinaryLinear(5, 4).double(), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 4, dtype=torch.float64)
    layer(x).backward(upstream)
    torch.testing.assert_close(layer.weight.grad, upstream.t() @ x.detach())
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0))
    torch.testing.assert_close(x.grad, upstream @ layer.weight.detach().sign())


@every_convolution
def test_gradients_of_convolution_are_those_of_its_signs(options):
    layer = convolution(options).double()
    images = torch.randn(2, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    signs = layer.weight.detach().sign().requires_grad_()
    expected = torch.autograd.grad(explicit_convolution(layer, images, signs).pow(2).sum(), [signs, images])
    actual = torch.autograd.grad(layer(images).pow(2).sum(), [layer.weight, images])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(BinaryLinear(5, 4), nn.Linear(5, 4)), (BinaryConv2d(1, 2, 3, bias=False), nn.Conv2d(1, 2, 3, bias=False))],
)
def test_state_dict_is_that_of_the_ordinary_layer(ours, theirs):
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize(
    ("layer", "shape"), [(lambda: BinaryLinear(5, 4), (3, 5)), (lambda: convolution({}), (2, 4, 5, 5))]
)
def test_ensemble_by_vmap_equals_a_loop(layer, shape):
    torch.manual_seed(0)
    layers, x = [layer() for _ in range(3)], torch.randn(shape)
    parameters, buffers = torch.func.stack_module_state(layers)

    def call(state, buffers):
        return torch.func.functional_call(layers[0], (state, buffers), (x,))

    torch.testing.assert_close(torch.func.vmap(call)(parameters, buffers), torch.stack([layer(x) for layer in layers]))


def test_network_compiles_to_one_graph_with_equal_value_and_gradients():
    torch.manual_seed(0)
    torch.compiler.reset()
    model = nn.Sequential(BinaryConv2d(1, 2, 3), BinaryActivation(), nn.Flatten(), BinaryLinear(18, 3), Scale(0.1))
    x, parameters = torch.randn(4, 1, 5, 5), list(model.parameters())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    actual = torch.autograd.grad(compiled(x).pow(2).sum(), parameters)
    expected = torch.autograd.grad(model(x).pow(2).sum(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("clip", "gradient"), [(1.0, [0, 1, 1, 0]), (2.0, [1, 1, 1, 0]), (None, [1, 1, 1, 1])])
def test_activation_is_the_sign_with_the_clipped_gradient(clip, gradient):
    x = torch.tensor([-2.0, -1.0, 0.5, 3.0], requires_grad=True)
    result = BinaryActivation(clip)(x)
    result.sum().backward()
    assert result.tolist() == [-1, -1, 1, 1]
    assert x.grad.tolist() == gradient


def test_activation_clips_at_one_unless_told_otherwise():
    assert BinaryActivation().clip == 1.0
    assert repr(BinaryActivation(0.5)) == "BinaryActivation(clip=0.5)"


@pytest.mark.parametrize("clip", [0, -1.0, float("nan")])
def test_activation_refuses_a_clip_that_is_not_positive(clip):
    with pytest.raises(ValueError, match="clip must be positive or None, got"):
        BinaryActivation(clip)


@pytest.mark.parametrize("initial", [1e-3, 0.5, 1.0, 200.0])
def test_scale_multiplies_by_its_initial_factor(initial):
    torch.testing.assert_close(Scale(initial)(torch.tensor([4.0, -2.0])), torch.tensor([4 * initial, -2 * initial]))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_scale_falls_but_stays_positive_under_steps_that_push_it_down(optimizer):
    scale, last = Scale(1.0), 1.0
    step = optimizer(scale.parameters(), lr=0.5)
    for _ in range(100):
        step.zero_grad()
        scale(torch.tensor(1.0)).backward()
        step.step()
        assert 0 < scale(torch.tensor(1.0)).item() < last
        last = scale(torch.tensor(1.0)).item()
    assert last < 0.1


def test_gradient_of_scale_is_the_explicit_formula():
    scale, scores = Scale(0.5), torch.tensor([4.0, -1.0], requires_grad=True)
    scale(scores).backward(torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(scores.grad, torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(scale.log_scale.grad, torch.tensor((4.0 * 1 - 1.0 * 2) * 0.5))


@pytest.mark.parametrize("initial", [0, -1.0, float("nan"), float("inf")])
def test_scale_refuses_an_initial_factor_that_is_not_a_positive_number(initial):
    with pytest.raises(ValueError, match="initial must be a number greater than 0, got"):
        Scale(initial)


def test_binarized_zero_weights_follow_their_sign_bit():
    layer = BinaryLinear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, -0.0]]))
    assert layer(torch.tensor([3.0, 5.0])).item() == -2.0
    assert binarize(layer.weight).tolist() == [[1.0, -1.0]]
