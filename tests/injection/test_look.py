"""A look before the first forward: flips are right from this one on, whatever the model makes of its bits."""

import pytest
import torch
from kernels import Kernel, kernel, signs
from leftovers import assert_nothing_left
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import bnnft
from bnnft.injection.training import BitFlips
from bnnft.nn import BinaryLinear
from bnnft.tracing.state import unchanged


def test_the_clean_score_does_not_depend_on_the_number_of_batches():
    model, _ = kernel(lambda x, w, scale: F.linear(x, signs(w)))
    x = torch.randn(200, 32)
    targets = model(x).argmax(1)
    curve = bnnft.accuracy_over_ber(model, zip(x.split(50), targets.split(50), strict=True), [0, 0.3], maps=2)
    assert curve.clean == curve.mean[0] == 1


USES = {
    "masked": lambda x, w, scale: F.linear(x, signs(w).tril()),
    "bases summed": lambda x, w, scale: F.linear(x, 0.6 * signs(w - 0.5) + 0.4 * signs(w + 0.5)),
    "padded": lambda x, w, scale: F.linear(F.pad(x, (1, 1)), F.pad(signs(w), (1, 1))),
}


@pytest.mark.parametrize("function", USES.values(), ids=USES)
def test_the_first_forward_has_the_flips_of_the_second(function):
    model, x = kernel(function)
    with bnnft.flipped(model, 0.2, weights=["w"] if function is USES["bases summed"] else None):
        first, second = model(x), model(x)
    assert torch.allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("gradient", ["straight_through", "exact"])
def test_the_first_backward_has_the_gradients_of_the_second(gradient):
    model, x = kernel(lambda x, w, scale: F.linear(x, signs(w) * scale))
    with bnnft.flipped(model, 0.2, gradient=gradient):
        first, second = (torch.autograd.grad(model(x).square().sum(), list(model.parameters())) for _ in range(2))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-2) for a, b in zip(first, second, strict=True))


def test_exact_gradients_of_a_scale_are_those_of_the_flipped_bits():
    model, x = kernel(lambda x, w, scale: F.linear(x, signs(w) * scale))
    with bnnft.flipped(model, 0.2, gradient="exact", weights=["w"]) as flips:
        model(x).sum().backward()
    bits = signs(model.w).detach().view(-1).clone()
    bits[flips["w"]] *= -1
    expected = (bits.view(32, 32) * x.sum(0)).sum(1, keepdim=True)
    assert torch.allclose(model.scale.grad, expected, atol=1e-3)


def test_a_named_weight_that_holds_its_bits_itself_is_flipped():
    model, x = kernel(lambda x, w, scale: F.linear(x, w))
    model.w.data.sign_()
    clean = model(x)
    with bnnft.flipped(model, 0.2, weights=["w"]):
        assert not torch.equal(model(x), clean)


def test_pruning_while_training_goes_on():
    model, x = kernel(lambda x, w, scale: F.linear(x, signs(w)))
    model.scale = None  # one parameter, so that only its name changes
    training = BitFlips(model, 0.1)
    for batch in range(4):
        if batch == 2:
            prune.l1_unstructured(model, "w", 0.5)
        with training.batch():
            model(x).square().mean().backward()


def test_a_look_leaves_no_trace():
    """Counters, lists, statistics, random streams and hooks are as after one forward, not after two."""

    class Keeping(Kernel):
        def __init__(self, function):
            super().__init__(function)
            self.calls, self.norm = [], nn.BatchNorm1d(32)

        def forward(self, x):
            self.calls.append(len(x))
            return F.dropout(self.norm(super().forward(x)), 0.5)

    torch.manual_seed(0)
    model, seen = Keeping(lambda x, w, scale: F.linear(x, signs(w))), []
    model.norm.register_forward_hook(lambda *call: seen.append(call))
    x = torch.randn(8, 32)
    with bnnft.flipped(model, 0.2, seed=1) as flips:
        torch.manual_seed(5)
        outputs = [model(x) for _ in range(2)]
    assert (model.calls, len(seen), int(model.norm.num_batches_tracked)) == ([8, 8], 2, 2)
    bits = signs(model.w).detach().view(-1)
    bits[flips["w"]] *= -1
    norm = nn.BatchNorm1d(32)
    torch.manual_seed(5)
    for output in outputs:
        assert torch.allclose(output, F.dropout(norm(F.linear(x, bits.view(32, 32))), 0.5), atol=1e-5)


def test_each_module_that_runs_for_itself_is_looked_at_before():
    """An encoder and a decoder that are called one after the other, outside of their model's forward."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": Kernel(USES["masked"]), "decoder": Kernel(USES["masked"])})
    x = torch.randn(8, 32)
    with bnnft.flipped(model, 0.2) as flips:
        first = model["decoder"](model["encoder"](x))
        assert list(flips) == ["encoder.w", "decoder.w"]
        assert torch.equal(first, model["decoder"](model["encoder"](x)))


@pytest.mark.parametrize("own", [True, False], ids=["own layer", "found"])
def test_flips_stay_where_the_first_forward_runs_in_what_puts_the_model_back(own):
    """A loss that is measured, say: hooks and lent flips come and go with their context, not with it."""
    torch.manual_seed(0)
    layer = BinaryLinear(32, 32, bias=False) if own else Kernel(lambda x, w, scale: F.linear(x, signs(w)))
    x, model = torch.randn(8, 32), nn.Sequential(layer)
    with bnnft.flipped(model, 0.2):
        with unchanged(model):
            first = model(x)
        second = model(x)
    assert torch.equal(first, second)
    assert not torch.equal(model(x), second)
    assert_nothing_left(model)


@pytest.mark.parametrize("gradient", ["straight_through", "exact"])
def test_what_checkpointing_computes_again_is_no_new_forward(gradient):
    torch.manual_seed(0)

    class Blocks(nn.Module):
        def __init__(self, checkpointed):
            super().__init__()
            self.block, self.checkpointed = Kernel(lambda x, w, scale: F.linear(x, signs(w)) * scale.mT), checkpointed

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)

    models, gradients = [Blocks(True), Blocks(False)], []
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        for x in torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1)):
            with bnnft.flipped(model, 0.2, gradient=gradient):
                for _ in range(2):
                    model(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(*gradients, strict=True))


def test_what_a_forward_does_to_its_arguments_it_does_once():
    torch.manual_seed(0)

    class Writing(Kernel):
        def forward(self, x, kept, named):
            x -= 0.5
            kept.append(named.pop("last"))
            return super().forward(x)

    model = Writing(lambda x, w, scale: F.linear(x, signs(w)))
    x, kept, named = torch.ones(2, 32), [], {"last": 1}
    with bnnft.flipped(model, 0.2):
        model(x, kept, named=named)
    assert (float(x.min()), kept, named) == (0.5, [1], {})


def test_modes_that_were_entered_since_are_left_first():
    model, x = kernel(lambda x, w, scale: F.linear(x, signs(w)))
    with bnnft.flipped(model, 0.2):
        with torch.device("cpu"):
            first = model(x)
        assert torch.equal(model(x), first)
    assert_nothing_left(model)


def test_a_transform_before_any_forward_is_refused_by_name_and_runs_after_one():
    model, x = kernel(lambda x, w, scale: F.linear(x, signs(w)))
    gradient = torch.func.grad(lambda x: model(x).sum())
    with (
        pytest.raises(RuntimeError, match=r"flipped can't look .* run the model once before"),
        bnnft.flipped(model, 0.2),
    ):
        gradient(x)
    with bnnft.flipped(model, 0.2):
        model(x)
        after = gradient(x)
    with bnnft.flipped(model, 0.2, weights=["w"]):
        assert torch.equal(gradient(x), after)


@pytest.mark.parametrize("values", [torch.eye(32), (torch.rand(32, 32) < 0.5).float()], ids=["identity", "mask"])
def test_parameters_of_0_and_1_are_named_and_left_alone(values):
    """Bits and masks can't be told apart; a name makes bits of them."""
    torch.manual_seed(0)
    model = nn.Sequential(Kernel(lambda x, w, scale: F.linear(x, signs(w))), nn.Linear(32, 32, bias=False))
    model[1].weight.data.copy_(values)
    with pytest.warns(UserWarning, match=r"no flips: 1 \(32, 32\)"), bnnft.flipped(model, 0.2) as flips:
        model(torch.randn(4, 32))
    assert list(flips) == ["0.w"]
    with bnnft.flipped(model, 0.2, weights=["1.weight"]) as flips:
        model(torch.randn(4, 32))
    assert list(flips) == ["1.weight"]
