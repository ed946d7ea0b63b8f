import pytest
import torch

from bnnft.nn import binarize
from bnnft.nn.binarize import Flips

INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
every_float = pytest.mark.parametrize("dtype", INTEGERS, ids=str)
every_clip = pytest.mark.parametrize("clip", [None, 0.5])


def bit_patterns(dtype):
    """All bit patterns of the 16-bit floats, random ones of the others; of both NaN signs and all payloads."""
    integer = INTEGERS[dtype]
    if integer == torch.int16:
        return torch.arange(-(2**15), 2**15).to(integer).view(dtype)
    limits = torch.iinfo(integer)
    return torch.randint(limits.min, limits.max, (9999,), dtype=integer, generator=torch.manual_seed(0)).view(dtype)


def explicit_signs(values):
    return torch.where(values.detach().view(INTEGERS[values.dtype]) < 0, -1.0, 1.0).to(values.dtype)


@every_float
@pytest.mark.parametrize("copies", [1, 100])  # below and above the width of the vector instructions
def test_result_is_the_sign_bit_for_zeros_infinities_and_nan(dtype, copies):
    positive = torch.tensor([0.0, torch.finfo(dtype).tiny, 1.0, torch.inf, torch.nan], dtype=dtype)
    negative = (positive.view(INTEGERS[dtype]) ^ torch.iinfo(INTEGERS[dtype]).min).view(dtype)
    assert binarize(positive.repeat(copies)).tolist() == [1.0] * 5 * copies
    assert binarize(negative.repeat(copies)).tolist() == [-1.0] * 5 * copies


@every_float
def test_result_is_the_sign_bit_for_every_bit_pattern(dtype):
    values = bit_patterns(dtype)
    result = binarize(values)
    assert result.dtype == dtype
    assert torch.equal(result, explicit_signs(values))


@every_float
def test_turning_the_sign_bit_turns_the_result(dtype):
    values = bit_patterns(dtype)
    turned = (values.view(INTEGERS[dtype]) ^ torch.iinfo(INTEGERS[dtype]).min).view(dtype)
    assert torch.equal(binarize(turned), -binarize(values))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3, 5)])
def test_shape_is_kept(shape):
    assert binarize(torch.randn(shape)).shape == shape


def test_memory_layout_does_not_matter():
    values = torch.randn(12, 10, generator=torch.manual_seed(0))
    assert torch.equal(binarize(values[1::2, 3:].t()), binarize(values)[1::2, 3:].t())


@every_float
def test_gradient_without_clip_is_the_upstream_gradient_everywhere(dtype):
    values = torch.tensor([-torch.inf, -3, -0.0, 0.0, 0.5, torch.inf, torch.nan], dtype=dtype, requires_grad=True)
    upstream = torch.arange(1, 8).to(dtype)
    binarize(values).backward(upstream)
    assert torch.equal(values.grad, upstream)


@every_float
def test_gradient_with_clip_is_zero_beyond_the_clip_and_passes_at_it(dtype):
    values = torch.tensor([-torch.inf, -0.75, -0.5, -0.0, 0.25, 0.5, 0.75, torch.nan], dtype=dtype, requires_grad=True)
    binarize(values, clip=0.5).backward(torch.arange(1, 9).to(dtype))
    assert values.grad.tolist() == [0, 0, 3, 4, 5, 6, 0, 0]


@every_clip
def test_gradient_of_a_function_of_signs_is_its_derivative_at_the_signs(clip):
    """Central differences are exact for a quadratic function, up to rounding."""
    generator = torch.manual_seed(1)
    values = torch.randn(6, dtype=torch.float64, generator=generator).requires_grad_()
    matrix = torch.randn(6, 6, dtype=torch.float64, generator=generator)

    def loss(signs):
        return signs @ matrix @ signs

    loss(binarize(values, clip)).backward()
    steps = torch.eye(6, dtype=torch.float64)
    signs = explicit_signs(values)
    derivative = torch.stack([(loss(signs + step) - loss(signs - step)) / 2 for step in steps])
    expected = derivative if clip is None else derivative * (values.detach().abs() <= clip)
    torch.testing.assert_close(values.grad, expected, rtol=1e-12, atol=1e-12)


@every_clip
def test_vmap_equals_a_loop_in_value_and_gradient(clip):
    values, weights = torch.randn(2, 4, 7, generator=torch.manual_seed(2))

    def loss(row, weight):
        return (binarize(row, clip) * weight).sum()

    assert torch.equal(torch.func.vmap(lambda row: binarize(row, clip))(values), binarize(values, clip))
    gradients = torch.func.vmap(torch.func.grad(loss))(values, weights)
    assert torch.equal(
        gradients, torch.stack([torch.func.grad(loss)(v, w) for v, w in zip(values, weights, strict=True)])
    )


@every_clip
def test_compiles_to_one_graph_with_equal_value_and_gradient(clip):
    torch.compiler.reset()
    compiled = torch.compile(lambda values: binarize(values, clip), backend="eager", fullgraph=True)
    values = torch.tensor([-2.0, -0.0, 0.0, 0.25, 3.0], requires_grad=True)
    upstream = torch.arange(1.0, 6.0)
    assert torch.equal(compiled(values), binarize(values))
    (gradient,) = torch.autograd.grad(compiled(values), values, upstream)
    (expected,) = torch.autograd.grad(binarize(values, clip), values, upstream)
    assert torch.equal(gradient, expected)


def test_what_is_exported_to_onnx_reads_the_sign_bit_without_copysign(monkeypatch):
    """ONNX has no copysign. Both exporters say that they are at work; torch.export stands for them."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    values = torch.tensor([-2.0, -0.0, 0.0, 0.25, torch.inf, -torch.inf, 1e-40, -1e-40])
    flips = (Flips(torch.tensor([0, 3])), Flips(torch.tensor([3, 4])))

    class Module(torch.nn.Module):
        def forward(self, values):
            return binarize(values), binarize(values, flips=flips)

    exported = torch.export.export(Module(), (values,))
    assert not any("copysign" in str(node.target) for node in exported.graph.nodes)
    monkeypatch.undo()
    for actual, expected in zip(exported.module()(values), Module()(values), strict=True):
        assert torch.equal(actual, expected)
