"""Flips where bits are made, in recomputed forwards, other threads, number formats and function transforms."""

import threading

import pytest
import torch
import torch.nn.functional as F
from binarized import Kernel, Linear, Product, Repeated
from binarizers import WIDTH, ste
from torch import nn
from torch.utils.checkpoint import checkpoint
from uses import mask_of, run, some_flips

from bnnft import flipped
from bnnft.ber import Independent, Key
from bnnft.injection.flipped import Injection

both_gradients = pytest.mark.parametrize("gradient", ["straight_through", "exact"])


def under(model, x, names, exact=False):
    """Return the context of flips in parameters of a model that was watched once, and the flips."""
    injection = Injection(model, exact=exact)
    with injection.finder:
        run(model, (x,))
    injection.learn()
    injection.finder.bits.settle()
    assert [site.name for site in injection.sites] == sorted(names)
    flips = some_flips(model, names)
    return injection.under(flips, Independent(0.3), Key(0)), flips


def with_flips(model, name, flips):
    """Return a parameter's signs with flips in them, on which gradients pass."""
    weight = model.get_parameter(name)
    signs = torch.where(weight.detach() >= 0, 1.0, -1.0).to(weight.dtype)
    return weight + (torch.where(mask_of(model, name, flips), -signs, signs) - weight).detach()


BACKWARDS = {
    "backward": lambda loss, leaves: loss.backward(),
    "autograd.backward": lambda loss, leaves: torch.autograd.backward(loss),
    "autograd.backward of several": lambda loss, leaves: torch.autograd.backward([loss, loss * 2]),
}


class Layers(nn.Module):
    """Activation checkpointing of modules: of a module by itself, or of a function that calls two."""

    def __init__(self, reentrant):
        super().__init__()
        self.f, self.a, self.b, self.reentrant = nn.Linear(WIDTH, WIDTH), Linear(), Linear(), reentrant

    def product(self, x):
        return self.b(torch.tanh(self.a(x)))

    def forward(self, x):
        return checkpoint(self.product, self.f(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("kind", [Repeated, Layers])
@pytest.mark.parametrize("backward", BACKWARDS.values(), ids=BACKWARDS)
@both_gradients
def test_checkpointing_gives_the_gradients_of_no_checkpointing(kind, reentrant, backward, gradient):
    """The repeated forward has the same flips, also where the function uses the module's own parameter."""
    results, x = [], torch.randn(6, WIDTH, generator=torch.manual_seed(1))
    for repeats in (True, False):
        torch.manual_seed(0)
        model = kind(reentrant)
        names = ["w"] if kind is Repeated else ["a.weight", "b.weight"]
        context, _ = under(model, x, names, gradient == "exact")
        with context:
            loss = (model(x) if repeats else model.product(model.f(x))).square().sum()
            backward(loss, list(model.parameters()))
        results.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_that_are_asked_for_recompute_with_flips():
    results, x = [], torch.randn(6, WIDTH, generator=torch.manual_seed(1))
    for repeats in (True, False):
        torch.manual_seed(0)
        model = Repeated(False)
        context, _ = under(model, x, ["w"])
        with context:
            loss = (model(x) if repeats else model.product(model.f(x))).square().sum()
            results.append(torch.autograd.grad(loss, list(model.parameters()), create_graph=True))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_product_inside_of_an_autograd_function_keeps_the_flipped_bits_for_its_backward():
    torch.manual_seed(0)
    model = Kernel((WIDTH, WIDTH), Product.apply)
    x = torch.randn(6, WIDTH, requires_grad=True)
    context, flips = under(model, x, ["w"])
    with context:
        output = model(x)
        found = torch.autograd.grad(output.square().sum(), [x, model.w])
    expected = F.linear(x, with_flips(model, "w", flips))
    wanted = torch.autograd.grad(expected.square().sum(), [x, model.w])
    assert torch.allclose(output, expected, atol=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@both_gradients
def test_any_float_type(dtype, gradient):
    torch.manual_seed(0)
    model = Kernel((WIDTH, WIDTH), lambda x, w: F.linear(x, w + (w.sign() - w).detach())).to(dtype)
    x = torch.randn(6, WIDTH, dtype=dtype)
    context, flips = under(model, x, ["w"], gradient == "exact")
    with context:
        output = model(x)
    assert output.dtype == dtype
    assert torch.allclose(output, F.linear(x, with_flips(model, "w", flips)), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("no_graph", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_autocast(no_graph):
    torch.manual_seed(0)
    model, x = Linear(bias=False), torch.randn(6, WIDTH)
    context, flips = under(model, x, ["weight"])
    with torch.autocast("cpu", torch.bfloat16), no_graph():
        with context:
            output = model(x)
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, F.linear(x, with_flips(model, "weight", flips)))


def test_vmap_over_binary_experts():
    """In a function transform nothing can be put in the place of a tensor: its values are exchanged."""
    torch.manual_seed(0)
    model = Kernel((4, 10, WIDTH), lambda x, w: torch.vmap(lambda each: F.linear(x, each.sign()))(w).sum(0))
    x = torch.randn(6, WIDTH)
    context, flips = under(model, x, ["w"])
    with context:
        output = model(x)
    bits = with_flips(model, "w", flips)
    assert torch.allclose(output, sum(F.linear(x, each) for each in bits), atol=1e-5)


def test_flips_in_every_thread_that_runs_the_model():
    torch.manual_seed(0)
    model, x, outputs = Linear(), torch.randn(6, WIDTH), {}
    context, flips = under(model, x, ["weight"])

    def work(number):
        outputs[number] = model(x + number)

    with context:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, output in outputs.items():
        assert torch.allclose(output, F.linear(x + number, with_flips(model, "weight", flips), model.bias), atol=1e-5)


def test_zeros_among_signs_stay_zeros_and_all_else_is_flipped():
    """torch.sign makes no bit of an exact zero."""
    torch.manual_seed(0)
    model, x = Kernel((WIDTH, WIDTH), lambda x, w: F.linear(x, w.sign())), torch.randn(6, WIDTH)
    model.w.data[0, 0] = model.w.data[3, 5] = 0.0
    context, flips = under(model, x, ["w"])
    mask = mask_of(model, "w", flips)
    with context:
        output = model(x)
    assert torch.allclose(output, F.linear(x, torch.where(mask, -model.w.sign(), model.w.sign())), atol=1e-5)


@pytest.mark.parametrize("make", [lambda w: torch.where(w >= 0, 1.0, -1.0), lambda w: ste(w.detach())], ids=["", "ste"])
def test_what_is_not_a_number_has_a_bit_where_the_layer_makes_one(make):
    """A comparison makes -1 of NaN, which is flipped as any other."""
    torch.manual_seed(0)
    model, x = Kernel((WIDTH, WIDTH), lambda x, w: F.linear(x, torch.where(w >= 0, 1.0, -1.0))), torch.randn(6, WIDTH)
    context, flips = under(model, x, ["w"])
    model.w.data.view(-1)[flips["w"][:5]] = torch.nan
    mask = mask_of(model, "w", flips)
    with context:
        output = model(x)
    bits = torch.where(model.w >= 0, 1.0, -1.0)
    assert torch.allclose(output, F.linear(x, torch.where(mask, -bits, bits)), atol=1e-5)


@both_gradients
def test_what_is_found_in_a_forward_is_flipped_in_it(gradient):
    """Of flipped(), which knows nothing of the layer before."""
    torch.manual_seed(0)
    model, x = Linear(), torch.randn(6, WIDTH)
    clean = model(x)
    with flipped(model, 0.3, gradient=gradient) as flips:
        first, second = model(x), model(x)
    expected = F.linear(x, with_flips(model, "weight", flips), model.bias)
    assert torch.allclose(first, expected, atol=1e-5)
    assert torch.allclose(second, expected, atol=1e-5)
    assert torch.equal(model(x), clean)


def hooks(module):
    return [*module._forward_pre_hooks, *module._forward_hooks, *module._forward_hooks_always_called]


def test_an_error_in_a_forward_leaves_nothing_behind():
    model, x = nn.Sequential(Linear(), Linear()), torch.randn(6, WIDTH)
    clean = model(x)
    handle = model[1].register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError), flipped(model, 0.3):
        model(x)
    handle.remove()
    assert torch.overrides._get_current_function_mode_stack() == []
    assert not any(hooks(module) for module in model.modules())
    assert torch.equal(model(x), clean)


def test_an_error_that_the_model_catches_does_not_end_the_flips():
    """A hook that fails before ours has run must not take the mode of the module around it away."""

    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.fails, self.a = nn.Linear(WIDTH, WIDTH), Linear()

        def forward(self, x):
            try:
                self.fails(x[:, :3])
            except RuntimeError:
                return self.a(x)

    torch.manual_seed(0)
    model, x = Tries(), torch.randn(6, WIDTH)
    context, flips = under(model, x, ["a.weight"])
    with context:
        output = model(x)
    bits = with_flips(model, "a.weight", flips)
    assert torch.allclose(output, F.linear(x, bits, model.a.bias), atol=1e-5)
