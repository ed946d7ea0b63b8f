import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnnft.injection.flipped as injection
from bnnft import flipped
from bnnft.ber import Asymmetric, Independent, Key
from bnnft.injection import latent_weight as latent
from bnnft.injection.flipped import TurnedBits, draw_flips
from bnnft.injection.signs import flip_signs
from bnnft.injection.sites import Site, find_sites
from bnnft.nn import BinaryActivation, BinaryConv2d, BinaryLinear

INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
LAYOUTS = {
    "1": lambda new: new(1),
    "7": lambda new: new(7),
    "1023": lambda new: new(1023),
    "matrix": lambda new: new(33, 31),
    "empty": lambda new: new(0, 3),
    "transposed": lambda new: new(33, 31).t(),
    "permuted": lambda new: new(3, 5, 7).permute(1, 2, 0),
    "channels last": lambda new: new(4, 3, 5, 5).to(memory_format=torch.channels_last),
    "sliced": lambda new: new(20, 31)[3:18:2, 1:30:3],
    "sliced and transposed": lambda new: new(20, 31)[3:, 1:].t(),
}
every_float = pytest.mark.parametrize("dtype", INTEGERS, ids=str)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
both_gradients = pytest.mark.parametrize("gradient", ["straight_through", "exact"])


class Holder(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.weight = nn.Parameter(values)


def random_values(layout, dtype):
    """Random bit patterns, among them zeros and infinities of both signs and NaN with payloads."""
    integer = INTEGERS[dtype]

    def new(*shape):
        limits = torch.iinfo(integer)
        bits = torch.randint(limits.min, limits.max, shape, dtype=integer, generator=torch.manual_seed(0))
        special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan], dtype=dtype).view(integer)
        bits.view(-1)[::3] = special[torch.arange(bits.view(-1)[::3].numel()) % 5]
        return bits

    return LAYOUTS[layout](new).view(dtype)


def bits_of(values):
    return values.detach().view(INTEGERS[values.dtype]).clone()


def all_bits(model):
    return {name: bits_of(weight) for name, weight in model.named_parameters()}


def equal(model, before):
    return all(torch.equal(bits, before[name]) for name, bits in all_bits(model).items())


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        BinaryLinear(20, 16, bias=False),
        BinaryActivation(),
        BinaryLinear(16, 12, bias=False),
        BinaryActivation(),
        BinaryLinear(12, 3, bias=False),
    )


def run_flipped(model, body, **options):
    with flipped(model, 0.3, **options) as flips:
        body(flips)


def turned_bits(model, seed=0, gradient="straight_through"):
    sites = find_sites(model)
    return TurnedBits(sites, draw_flips(sites, Independent(0.3), Key(seed)), gradient)


@every_float
@every_layout
@pytest.mark.parametrize("rate", [0, 0.3, 1])
def test_the_drawn_bits_turn_inside_and_return_bit_for_bit(dtype, layout, rate):
    model = Holder(random_values(layout, dtype))
    before = bits_of(model.weight)
    with flipped(model, rate, seed=1, weights=["weight"]) as flips:
        changed = (bits_of(model.weight) ^ before).flatten()
        assert torch.equal(changed.nonzero().squeeze(1), flips["weight"])
        assert set(changed.tolist()) <= {0, torch.iinfo(before.dtype).min}
    assert torch.equal(bits_of(model.weight), before)
    assert len(flips["weight"]) == {0: 0, 1: before.numel()}.get(rate, len(flips["weight"]))


def test_flips_are_those_that_the_error_model_draws_for_seed_draw_and_position():
    model = network()
    with flipped(model, 0.2, seed=3, draw=4) as flips:
        pass
    weights = dict(model.named_parameters())
    expected = {name: Independent(0.2).flips(weight, Key(3, 4, i)) for i, (name, weight) in enumerate(weights.items())}
    assert flips.keys() == expected.keys()
    assert all(torch.equal(flips[name], expected[name]) for name in expected)


def test_an_error_model_of_ones_own_says_which_bits_turn():
    class First:
        def flips(self, weight, key):
            return torch.tensor([0]) if key.name == "2.weight" else torch.tensor([], dtype=torch.int64)

    model = network()
    before = all_bits(model)
    with flipped(model, First()):
        changed = {name: int((bits != before[name]).sum()) for name, bits in all_bits(model).items()}
    assert changed == {"0.weight": 0, "2.weight": 1, "4.weight": 0}
    assert equal(model, before)


@pytest.mark.parametrize("weights", [["2"], ["2", "4"], ["*.weight"]], ids=str)
def test_a_weight_has_the_same_flips_whichever_others_are_selected(weights):
    model = network()
    with flipped(model, 0.3, seed=5) as flips_of_all, flipped(model, 0.3, seed=5, weights=weights) as flips:
        assert torch.equal(flips["2.weight"], flips_of_all["2.weight"])


@pytest.mark.parametrize("other", [{"seed": 1}, {"draw": 1}], ids=str)
def test_another_seed_or_draw_gives_other_flips(other):
    model = network()
    with flipped(model, 0.3) as flips, flipped(model, 0.3, **other) as other_flips:
        assert all(not torch.equal(flips[name], other_flips[name]) for name in flips)


def test_the_layer_computes_with_the_turned_bits():
    model = BinaryConv2d(2, 3, 3, bias=False)
    x, signs = torch.randn(1, 2, 5, 5), model.weight.detach().sign()
    with flipped(model, 0.3) as flips:
        signs.view(-1)[flips["weight"]] *= -1
        assert torch.equal(model(x), F.conv2d(x, signs))


def test_nested_flips_add_up_and_return_one_by_one():
    model = network()
    clean = all_bits(model)
    with flipped(model, 0.4, seed=1) as first:
        outer = all_bits(model)
        with flipped(model, 0.4, seed=2) as second:
            for name, bits in all_bits(model).items():
                once = set(first[name].tolist()) ^ set(second[name].tolist())
                assert (bits != clean[name]).flatten().nonzero().squeeze(1).tolist() == sorted(once)
        assert equal(model, outer)
    assert equal(model, clean)


@both_gradients
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_bits_return_and_the_error_passes_on(error, gradient):
    def body(flips):
        assert not equal(model, before)
        raise error

    model = network()
    before = all_bits(model)
    with pytest.raises(error):
        run_flipped(model, body, gradient=gradient)
    assert equal(model, before)
    assert not any(weight._backward_hooks for weight in model.parameters())


def test_bits_return_when_a_generator_that_holds_them_is_closed():
    def batches():
        with flipped(model, 0.3):
            yield

    model = network()
    before = all_bits(model)
    held = batches()
    next(held)
    assert not equal(model, before)
    held.close()
    assert equal(model, before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_bits_turn_and_return_without_autograd(mode):
    model, x = network(), torch.randn(4, 20)
    before = all_bits(model)
    with flipped(model, 0.3):
        expected = model(x).detach()
    with mode(), flipped(model, 0.3):
        assert torch.equal(model(x), expected)
    assert equal(model, before)
    with mode():
        inside = flipped(model, 0.3)
        inside.__enter__()
    assert not equal(model, before)
    inside.__exit__(None, None, None)
    assert equal(model, before)


def explicit_gradients(model, x, flips, exact):
    """The loop written by hand: turned signs as leaves, their gradients, negated where a bit was turned."""
    signs, turns = [], []
    for name, weight in model.named_parameters():
        turn = torch.ones(weight.numel())
        turn[flips[name]] = -1
        turns.append(turn.view_as(weight))
        signs.append((weight.detach().sign() * turns[-1]).requires_grad_())
    hidden = x
    for sign in signs[:-1]:
        hidden = BinaryActivation()(F.linear(hidden, sign))
    gradients = torch.autograd.grad(F.linear(hidden, signs[-1]).pow(2).mean(), signs)
    return [gradient * turn if exact else gradient for gradient, turn in zip(gradients, turns, strict=True)]


@both_gradients
def test_gradient_is_that_of_the_loop_written_by_hand(gradient):
    model, x = network(), torch.randn(8, 20)
    with flipped(model, 0.3, gradient=gradient) as flips:
        model(x).pow(2).mean().backward()
    expected = explicit_gradients(model, x, flips, gradient == "exact")
    assert all(torch.equal(w.grad, e) for w, e in zip(model.parameters(), expected, strict=True))


@both_gradients
def test_accumulation_over_two_flips_takes_each_batch_with_its_own_flips(gradient):
    model, batches, expected = network(), torch.randn(3, 8, 20), []
    for draw, x in enumerate(batches[:2]):
        with flipped(model, 0.3, draw=draw, gradient=gradient) as flips:
            model(x).pow(2).mean().backward()
        expected.append(explicit_gradients(model, x, flips, gradient == "exact"))
    nothing = {name: torch.tensor([], dtype=torch.int64) for name in flips}
    model(batches[2]).pow(2).mean().backward()
    expected.append(explicit_gradients(model, batches[2], nothing, exact=True))
    for weight, (first, second, clean) in zip(model.parameters(), zip(*expected, strict=True), strict=True):
        assert torch.equal(weight.grad, first + second + clean)


def test_exact_gradient_of_a_weight_used_twice_is_negated_once():
    layer, x = BinaryLinear(6, 6, bias=False), torch.randn(4, 6)
    with flipped(layer, 0.3, gradient="straight_through"):
        (plain,) = torch.autograd.grad(layer(layer(x)).sum(), layer.weight)
    with flipped(layer, 0.3, gradient="exact") as flips:
        (exact,) = torch.autograd.grad(layer(layer(x)).sum(), layer.weight)
    plain.view(-1)[flips["weight"]] *= -1
    assert torch.equal(exact, plain)


def test_exact_gradient_of_an_expanded_gradient_is_negated_where_a_bit_turned():
    """The gradient of a sum is one number in memory."""
    layer = BinaryLinear(6, 6, bias=False)
    with flipped(layer, 0.3, gradient="exact") as flips:
        layer.weight.sum().backward()
    assert (layer.weight.grad == -1).flatten().nonzero().squeeze(1).tolist() == flips["weight"].tolist()


def test_exact_gradient_leaves_frozen_weights_alone():
    model = network()
    model[2].weight.requires_grad_(False)
    before = all_bits(model)
    with flipped(model, 0.3, gradient="exact"):
        model(torch.randn(4, 20)).sum().backward()
    assert model[2].weight.grad is None
    assert equal(model, before)


def test_backward_after_the_bits_are_back_raises_where_a_layer_saved_the_turned_weight():
    """Turning and restoring are writes that autograd knows of: no gradient of the wrong weights, in silence."""
    layer, x = nn.Linear(6, 4, bias=False), torch.randn(2, 6, requires_grad=True)
    with flipped(layer, 0.3, weights=["weight"]):
        loss = layer(x).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_every_turn_is_a_new_version_of_the_weight():
    model, versions = BinaryLinear(6, 4), []
    versions.append(model.weight._version)
    with flipped(model, 0.3):
        versions.append(model.weight._version)
    versions.append(model.weight._version)
    assert all(later > earlier for earlier, later in pairwise(versions))


def test_overwritten_bits_are_reported_by_layer_and_count_and_all_others_return():
    @torch.no_grad()
    def overwrite(flips):
        where = flips["2.weight"][:3]
        written = -7 * model[2].weight.sign().flatten()[where]  # with the sign that the bits had before
        model[2].weight.view(-1)[where] = written
        before["2.weight"].view(-1)[where] = bits_of(written)

    model = network()
    before = all_bits(model)
    with pytest.raises(RuntimeError, match=r"\(2\.weight: 3 flipped bits were overwritten\)"):
        run_flipped(model, overwrite)
    assert equal(model, before)


@torch.no_grad()
def negate(*weights):
    for weight in weights:
        weight.neg_()


def test_every_overwritten_layer_is_reported_at_once():
    model = network()
    with pytest.raises(RuntimeError, match=r"4\.weight: \d+ flipped.*0\.weight: \d+ flipped"):
        run_flipped(model, lambda flips: negate(model[0].weight, model[4].weight))


@pytest.mark.parametrize(
    "write", [lambda w: w.mul_(0.5), lambda w: w.clamp_(-0.1, 0.1), lambda w: w.copysign_(w), lambda w: w.add_(0.0)]
)
def test_a_write_that_keeps_all_signs_keeps_its_values_with_the_bits_turned_back(write):
    model, expected = network(), network()
    with flipped(model, 0.3), torch.no_grad():
        write(model[0].weight)
    with torch.no_grad():
        write(expected[0].weight)
    assert equal(model, all_bits(expected))


def test_replaced_memory_is_reported_and_the_other_weights_return():
    model = network()
    before = all_bits(model)
    with pytest.raises(RuntimeError, match=r"\(2\.weight: its memory was replaced\)"), flipped(model, 0.3):
        model[2].weight.data = new = torch.randn(12, 16)
    assert model[2].weight.data_ptr() == new.data_ptr()
    before["2.weight"] = bits_of(new)
    assert equal(model, before)


def test_overwriting_does_not_hide_an_error_of_the_body():
    def body(flips):
        negate(model[0].weight)
        raise ValueError("the body's own")

    model = network()
    with pytest.raises(RuntimeError, match="overwritten") as caught:
        run_flipped(model, body)
    assert isinstance(caught.value.__context__, ValueError)


def test_restoring_again_does_nothing():
    model = network()
    before = all_bits(model)
    turned = turned_bits(model)
    assert not equal(model, before)
    turned.restore()
    turned.restore()
    assert equal(model, before)


def interrupt_turn(monkeypatch, number, when):
    """Raise KeyboardInterrupt before or after the turn of this number, counted from now."""
    count = 0

    def turn(values, indices):
        nonlocal count
        count += 1
        if (count, when) == (number, "before"):
            raise KeyboardInterrupt
        flip_signs(values, indices)
        if (count, when) == (number, "after"):
            raise KeyboardInterrupt

    monkeypatch.setattr(latent, "flip_signs", turn)


every_interrupt = pytest.mark.parametrize(
    ("number", "when"), [(n, when) for n in (1, 2, 3) for when in ("before", "after")]
)


@both_gradients
@every_interrupt
def test_an_interrupt_while_bits_are_turned_leaves_none_turned(monkeypatch, number, when, gradient):
    model = network()
    before = all_bits(model)
    interrupt_turn(monkeypatch, number, when)
    with pytest.raises(KeyboardInterrupt), flipped(model, 0.3, gradient=gradient):
        pytest.fail("the context was entered")
    assert equal(model, before)
    assert all(not weight._backward_hooks for weight in model.parameters())


@both_gradients
@every_interrupt
def test_an_interrupted_restore_is_finished_by_the_next_one(monkeypatch, number, when, gradient):
    model = network()
    before = all_bits(model)
    turned = turned_bits(model, gradient=gradient)
    interrupt_turn(monkeypatch, number, when)
    with pytest.raises(KeyboardInterrupt):
        turned.restore()
    turned.restore()
    assert equal(model, before)
    assert all(not weight._backward_hooks for weight in model.parameters())


def interrupted_at(line, function):
    """Call the function, with a KeyboardInterrupt at this line of the module's code in order of execution."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename not in (injection.__file__, latent.__file__):
            return None
        count += event == "line"
        if count == line and event == "line":
            raise KeyboardInterrupt
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(outer)
    return False


def test_turning_undoes_itself_after_an_interrupt_at_any_line():
    model, line = network(), 1
    before = all_bits(model)
    while interrupted_at(line, lambda: turned_bits(model)):
        assert equal(model, before), f"line {line}"
        line += 1
    assert line > 30
    assert not equal(model, before)


def test_a_restore_is_finished_by_the_next_one_after_an_interrupt_at_any_line():
    model, line, interrupted = network(), 0, True
    before = all_bits(model)
    while interrupted:
        line, turned = line + 1, turned_bits(model)
        interrupted = interrupted_at(line, turned.restore)
        turned.restore()
        assert equal(model, before), f"line {line}"
    assert line > 30


def test_clean_returns_the_clean_state_and_changes_nothing():
    model = nn.Sequential(BinaryLinear(6, 4), nn.BatchNorm1d(4))
    clean = {name: value.clone() for name, value in model.state_dict().items()}
    turned = turned_bits(model)
    state = model.state_dict()
    dirty = state["0.weight"].clone()
    cleaned = turned.clean(model, state)
    assert cleaned.keys() == clean.keys()
    assert cleaned._metadata == state._metadata
    assert all(torch.equal(cleaned[name], clean[name]) for name in clean)
    assert all(cleaned[name] is state[name] for name in clean if name != "0.weight")
    assert torch.equal(model[0].weight, dirty)
    assert torch.equal(state["0.weight"], dirty)
    turned.restore()
    assert torch.equal(model[0].weight, clean["0.weight"])
    assert torch.equal(cleaned["0.weight"], clean["0.weight"])


def test_clean_after_the_restore_is_the_state_itself():
    model = network()
    turned = turned_bits(model)
    turned.restore()
    state = model.state_dict()
    assert all(turned.clean(model, state)[name] is value for name, value in state.items())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gradient": "masked"}, ValueError, "gradient must be one of straight_through, exact, got 'masked'"),
        ({"seed": -1}, ValueError, "seed must be an integer >= 0, got -1"),
        ({"draw": -1}, ValueError, "draw must be an integer >= 0, got -1"),
        ({"error_model": 1.5}, ValueError, r"rate must be a fraction in \[0, 1\], got 1.5"),
        ({"error_model": "0.1"}, TypeError, "rate must be a fraction"),
        ({"weights": ["lost"]}, ValueError, "'lost' matches no parameter"),
        ({"model": nn.Linear(2, 2)}, ValueError, "has no binarized weights"),
    ],
    ids=str,
)
def test_bad_arguments_raise_before_any_bit_turns(arguments, error, message):
    model = network()
    before = all_bits(model)
    with pytest.raises(error, match=message), flipped(**{"model": model, "error_model": 0.1, **arguments}):
        pytest.fail("the context was entered")
    assert equal(model, before)


@pytest.mark.parametrize("indices", [[0, 10**6], [-(10**6)]], ids=str)
def test_indices_out_of_range_raise_and_leave_no_bit_turned(indices):
    class Wrong:
        def flips(self, weight, key):
            return torch.tensor(indices if key.position == 1 else [0])

    model = network()
    before = all_bits(model)
    with pytest.raises((IndexError, RuntimeError)), flipped(model, Wrong()):
        pytest.fail("the context was entered")
    assert equal(model, before)


def states_turned_by(model, *seeds):
    sites = find_sites(model)
    return [TurnedBits(sites, draw_flips(sites, Independent(0.5), Key(seed))) for seed in seeds]


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 1, 0), (1, 0, 2)])
def test_overlapping_turns_are_restored_in_any_order(order):
    model = network()
    before = all_bits(model)
    states = states_turned_by(model, 0, 1, 2)
    for number in order:
        states[number].restore()
    assert equal(model, before)


def test_a_foreign_write_under_overlapping_turns_is_told_from_our_own():
    """Only positions that somebody else wrote are reported, once."""
    model = network()
    first, second = states_turned_by(model, 0, 1)
    with torch.no_grad():
        model[2].weight.view(-1)[:5] = 7.0
    with pytest.raises(RuntimeError, match=r"\(2\.weight: [1-5] flipped bits were overwritten\)"):
        first.restore()
    second.restore()
    assert model[2].weight.view(-1)[:5].abs().tolist() == [7.0] * 5


def test_clean_takes_the_flips_of_every_open_state_out_of_a_checkpoint():
    model = network()
    clean = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = states_turned_by(model, 0, 1)
    cleaned = second.clean(model, first.clean(model, model.state_dict()))
    assert all(torch.equal(cleaned[name], value) for name, value in clean.items())


def test_weights_made_in_inference_mode_are_restored():
    with torch.inference_mode():
        model = BinaryLinear(8, 4, bias=False)
        before = model.weight.clone()
        with flipped(model, 0.5):
            assert not torch.equal(model.weight, before)
        assert torch.equal(model.weight, before)


@pytest.mark.parametrize("call", [4, 5, 6])
def test_flipped_restores_all_when_its_own_restore_is_interrupted(monkeypatch, call):
    """The interrupt comes at the first, second or third weight that is put back."""
    model, calls = network(), []
    before = all_bits(model)

    def turn(values, indices):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        flip_signs(values, indices)

    monkeypatch.setattr(latent, "flip_signs", turn)
    with pytest.raises(KeyboardInterrupt), flipped(model, 0.5):
        pass
    assert equal(model, before)


def test_second_derivatives_go_through_an_exact_flip():
    """At rate 1 the gradient of a linear layer's weight is -x, and its derivative by x is -1."""
    model, x = nn.Linear(4, 1, bias=False), torch.randn(1, 4, requires_grad=True)
    with flipped(model, 1.0, weights=["weight"], gradient="exact"):
        (gradient,) = torch.autograd.grad(model(x).sum(), model.weight, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), x)
    assert torch.equal(gradient, -x)
    assert second.tolist() == [[-1.0] * 4]


@pytest.mark.parametrize(("zero", "bit"), [(None, 1), (1, 1), (-1, 0)])
def test_a_latent_of_zero_holds_the_bit_that_its_layer_makes_of_it(zero, bit):
    """None: its sign bit, which is that of +0."""
    site = Site("weight", nn.Parameter(torch.zeros(10)), 0, zero=zero)
    for errors, wrong_bit in ((Asymmetric(1, 0), 0), (Asymmetric(0, 1), 1)):
        assert len(draw_flips([site], errors, Key())["weight"]) == (10 if bit == wrong_bit else 0)
