"""Running a model with flips as a context: what it yields, what the model computes, and what is left after it."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from patterns import Centred, SignFunction
from torch import nn

from bnnft import flipped
from bnnft.ber import Asymmetric, ErrorModel, Independent, Key
from bnnft.nn import BinaryActivation, BinaryConv2d, BinaryLinear

every_way = pytest.mark.parametrize("how", ["auto", "operand", "latent"])
both_gradients = pytest.mark.parametrize("gradient", ["straight_through", "exact"])
X = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))


def network(layer=lambda a, b: BinaryLinear(a, b, bias=False)):
    torch.manual_seed(0)
    return nn.Sequential(layer(20, 16), BinaryActivation(), layer(16, 12), BinaryActivation(), layer(12, 3))


def by_multiplication(model, flips, x=X):
    """Outputs of the network with the signs of its weights multiplied by hand."""
    for number in (0, 2, 4):
        signs = torch.where(model[number].weight.detach() >= 0, 1.0, -1.0)
        signs.view(-1)[flips[f"{number}.weight"]] *= -1
        x = F.linear(x, signs)
        x = torch.where(x >= 0, 1.0, -1.0) if number < 4 else x
    return x


def raw(model):
    return {name: weight.detach().clone().view(torch.int32) for name, weight in model.named_parameters()}


def is_untouched(model, before):
    modules = list(model.modules())
    left = any(part._forward_hooks or part._forward_pre_hooks or "flips" in vars(part) for part in modules)
    same = all(torch.equal(bits, before[name]) for name, bits in raw(model).items())
    return same and not left and not torch.overrides._get_current_function_mode_stack()


@every_way
@pytest.mark.parametrize("grad", [True, False])
def test_the_model_computes_with_exactly_the_drawn_bits_and_is_as_before_after_it(how, grad):
    model = network()
    before, clean = raw(model), model(X)
    with torch.set_grad_enabled(grad), flipped(model, 0.3, seed=1, how=how) as flips:
        inside = model(X)
    assert torch.equal(inside, by_multiplication(network(), flips))
    assert not torch.equal(inside, clean)
    assert torch.equal(model(X), clean)
    assert is_untouched(model, before)


@pytest.mark.parametrize("how", ["auto", "operand"])
def test_no_parameter_is_written_to(how):
    model = network()
    before, versions = raw(model), [weight._version for weight in model.parameters()]
    with flipped(model, 0.3, how=how):
        model(X).sum().backward()
        assert [weight._version for weight in model.parameters()] == versions
        assert all(torch.equal(bits, before[name]) for name, bits in raw(model).items())


@pytest.mark.parametrize("layer", [SignFunction, Centred])
def test_layers_that_nobody_knows_are_found_and_flipped_in_their_first_forward_and_in_each_later_one(layer):
    model = network(layer)
    clean = model(X)
    with torch.no_grad(), flipped(model, 0.3, seed=2) as flips:
        first, second = model(X), model(X)
        assert list(flips) == ["0.weight", "2.weight", "4.weight"]
    assert torch.equal(first, second)
    assert not torch.equal(first, clean)
    if layer is SignFunction:
        assert torch.equal(first, by_multiplication(model, flips))
    for position, (name, weight) in enumerate(model.named_parameters()):
        assert torch.equal(flips[name], Independent(0.3).flips(weight, Key(2, 0, position)))
    assert torch.equal(model(X), clean)


class Recurrent(nn.Module):
    """One weight at every step, binarized once."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20, 20))

    def forward(self, x):
        bits = torch.where(self.weight - self.weight.mean() >= 0, 1.0, -1.0)
        for _ in range(3):
            x = torch.tanh(F.linear(x, bits) / 4)
        return x


@pytest.mark.parametrize("how", ["auto", "operand"])
def test_every_use_is_flipped_in_the_forward_that_finds_the_weight_too(how):
    model = Recurrent()
    with torch.no_grad(), flipped(model, 0.3, how=how) as flips:
        outputs = [model(X), model(X)]
    bits = torch.where(model.weight.detach() - model.weight.mean() >= 0, 1.0, -1.0)
    bits.view(-1)[flips["weight"]] *= -1
    expected = X
    for _ in range(3):
        expected = torch.tanh(F.linear(expected, bits) / 4)
    assert all(torch.equal(output, expected) for output in outputs)


def test_known_and_unknown_layers_of_one_network_are_all_flipped():
    torch.manual_seed(0)
    model = nn.Sequential(Centred(20, 16), nn.ReLU(), BinaryLinear(16, 3, bias=False))
    with flipped(model, 0.2) as flips:
        assert list(flips) == ["2.weight"]
        model(X)
        assert sorted(flips) == ["0.weight", "2.weight"]


def test_a_latent_that_is_not_the_bit_is_refused():
    model = network(Centred)
    before = raw(model)
    named = ["0.weight", "2.weight", "4.weight"]
    with pytest.raises(RuntimeError, match="how='operand'"), flipped(model, 0.3, how="latent", weights=named):
        model(X)
    assert is_untouched(model, before)


def test_flips_are_those_that_the_error_model_draws_for_seed_draw_and_position():
    model = network()
    with flipped(model, 0.2, seed=3, draw=4) as flips:
        pass
    weights = dict(model.named_parameters())
    expected = {name: Independent(0.2).flips(weight, Key(3, 4, i)) for i, (name, weight) in enumerate(weights.items())}
    assert flips.keys() == expected.keys()
    assert all(torch.equal(flips[name], expected[name]) for name in expected)


@every_way
def test_an_error_model_of_ones_own_says_which_bits_are_wrong(how):
    class First(ErrorModel):
        def flips(self, weight, key):
            return torch.tensor([0]) if key.name == "2.weight" else torch.tensor([], dtype=torch.int64)

    model = network()
    with flipped(model, First(), how=how) as flips:
        assert {name: indices.tolist() for name, indices in flips.items()} == {
            "0.weight": [],
            "2.weight": [0],
            "4.weight": [],
        }
        assert torch.equal(model(X), by_multiplication(network(), flips))


@pytest.mark.parametrize("how", ["auto", "latent"])
def test_errors_that_read_the_bits_flip_those_of_the_stated_kind(how):
    layer = BinaryLinear(30, 20, bias=False)
    with flipped(layer, Asymmetric(0, 1), how=how) as flips:
        assert torch.equal(layer(torch.ones(1, 30)), torch.full((1, 20), -30.0))
    assert len(flips["weight"]) == int((layer.weight > 0).sum())


@pytest.mark.parametrize("weights", [["2"], ["2", "4"], ["*.weight"]], ids=str)
def test_a_weight_has_the_same_flips_whichever_others_are_selected(weights):
    model = network()
    with flipped(model, 0.3, seed=5) as of_all, flipped(model, 0.3, seed=5, weights=weights) as flips:
        assert torch.equal(flips["2.weight"], of_all["2.weight"])


@pytest.mark.parametrize("other", [{"seed": 1}, {"draw": 1}], ids=str)
def test_another_seed_or_draw_gives_other_flips(other):
    model = network()
    with flipped(model, 0.3) as flips, flipped(model, 0.3, **other) as other_flips:
        assert all(not torch.equal(flips[name], other_flips[name]) for name in flips)


@every_way
def test_a_convolution_computes_with_the_flipped_bits(how):
    model = BinaryConv2d(2, 3, 3, bias=False)
    x, signs = torch.randn(1, 2, 5, 5), model.weight.detach().sign()
    with flipped(model, 0.3, how=how) as flips:
        signs.view(-1)[flips["weight"]] *= -1
        assert torch.equal(model(x), F.conv2d(x, signs))


@every_way
def test_nested_flips_add_up_and_go_one_by_one(how):
    model = network()
    clean = model(X)
    with torch.no_grad(), flipped(model, 0.4, seed=1, how=how) as first:
        outer = model(X)
        with flipped(model, 0.4, seed=2, how=how) as second:
            both = {
                name: torch.tensor(sorted(set(first[name].tolist()) ^ set(second[name].tolist()))) for name in first
            }
            assert torch.equal(model(X), by_multiplication(network(), both))
        assert torch.equal(model(X), outer)
        assert not torch.equal(outer, clean)
    assert torch.equal(model(X), clean)


@every_way
@both_gradients
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_error_inside_passes_on_and_leaves_the_model_as_it_was(error, gradient, how):
    model = network()
    before, clean = raw(model), model(X)

    def run():
        with flipped(model, 0.3, gradient=gradient, how=how):
            assert not torch.equal(model(X), clean)
            raise error

    with pytest.raises(error):
        run()
    assert is_untouched(model, before)
    assert not any(weight._backward_hooks for weight in model.parameters())
    assert torch.equal(model(X), clean)


@every_way
def test_a_generator_that_holds_flips_and_is_closed_restores(how):
    model = network()
    before, clean = raw(model), model(X)

    def batches():
        with flipped(model, 0.3, how=how):
            yield model(X)

    generator = batches()
    assert not torch.equal(next(generator), clean)
    generator.close()
    assert is_untouched(model, before)


@every_way
@both_gradients
def test_the_gradient_is_that_of_a_multiplication_by_hand(gradient, how):
    """Straight through, the flip is a constant that is added; exact, a factor."""
    model, reference = network(), network()
    with flipped(model, 0.3, seed=1, gradient=gradient, how=how) as flips:
        model(X).square().sum().backward()
    x = X
    for number in (0, 2, 4):
        weight = reference[number].weight
        factor = torch.ones(weight.numel())
        factor[flips[f"{number}.weight"]] = -1
        bits = reference[number].bits()
        wrong = bits * factor.view_as(bits)
        bits = wrong if gradient == "exact" else bits + (wrong - bits).detach()
        x = F.linear(x, bits)
        x = reference[number + 1](x) if number < 4 else x
    x.square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


@every_way
def test_saves_and_copies_inside_are_clean_and_carry_no_flips(how):
    model = network()
    clean, states = model(X), raw(model)
    with flipped(model, 0.3, how=how):
        assert not torch.equal(model(X), clean)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        saved = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(torch.equal(each(X), clean) for each in copies)
    assert all(torch.equal(saved[name].view(torch.int32), states[name]) for name in saved)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"error_model": 1.5}, ValueError, r"rate must be a fraction in \[0, 1\], got 1.5"),
        ({"error_model": 0.1, "seed": -1}, ValueError, "seed must be an integer >= 0, got -1"),
        ({"error_model": 0.1, "draw": -2}, ValueError, "draw must be an integer >= 0, got -2"),
        ({"error_model": 0.1, "gradient": "both"}, ValueError, "gradient must be one of straight_through, exact"),
        ({"error_model": 0.1, "how": "hook"}, ValueError, "how must be one of auto, operand, latent, got 'hook'"),
        ({"error_model": 0.1, "target": "neurons"}, ValueError, "target must be one of weights, activations, both"),
        ({"error_model": 0.1, "weights": ["9"]}, ValueError, "the pattern '9' matches no parameter"),
        ({"error_model": 0.1, "weights": "2"}, TypeError, "weights must be a list of patterns or a function, got '2'"),
    ],
)
def test_bad_arguments_raise_before_anything_is_flipped(arguments, error, message):
    model = network()
    before = raw(model)
    with pytest.raises(error, match=message), flipped(model, **arguments):
        pytest.fail("entered")
    assert is_untouched(model, before)


def test_a_model_without_binarized_weights_is_an_error():
    model = nn.Sequential(nn.Linear(20, 3))
    with pytest.raises(ValueError, match="Sequential has no binarized weights"), flipped(model, 0.1):
        model(X)
