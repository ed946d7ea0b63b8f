"""A weight is restored bit for bit, whoever else writes to it, in any order, and after an interrupt at any line."""

import sys
from itertools import permutations

import pytest
import torch
from layouts import bits_of, every_float, every_layout, random_values
from torch import nn

from bnnft.injection import latent_weight
from bnnft.injection.latent_weight import LatentWeight
from bnnft.injection.sites import Site


def latent(values, zero=None):
    return LatentWeight(Site("fc.weight", nn.Parameter(values), 0, zero=zero))


def uniform(*shape, seed=0):
    """Values of both signs, none of them 0."""
    values = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.1
    return torch.where(torch.rand(*shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.5, -values, values)


def flipped_bits(weight, before):
    """The flat indices at which nothing but the sign bit differs; fails where anything else does."""
    changed = (bits_of(weight) ^ before).flatten()
    assert set(changed.tolist()) <= {0, torch.iinfo(before.dtype).min}
    return changed.nonzero().squeeze(1).tolist()


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@every_float
@every_layout
def test_the_flipped_bits_differ_and_come_back(dtype, layout):
    one = latent(random_values(layout, dtype))
    before, indices = bits_of(one.weight), torch.arange(0, one.weight.numel(), 3)
    assert one.flip("a", indices) is None
    assert flipped_bits(one.weight, before) == indices.tolist()
    assert one.flipped
    assert one.restore("a") is None
    assert torch.equal(bits_of(one.weight), before)
    assert not one.flipped
    assert one.restore("a") is None
    assert torch.equal(bits_of(one.weight), before)


SETS = {"a": [0, 1, 2, 5, 9], "b": [1, 2, 3, 9], "c": [2, 3, 4, 9, 11]}


@pytest.mark.parametrize("zero", [None, 1, -1])
@pytest.mark.parametrize("order", list(permutations(SETS)), ids="".join)
def test_windows_add_up_and_close_in_any_order(order, zero):
    """With latents of exactly 0 of both signs among them, in the layers that compare."""
    values = uniform(12)
    if zero is not None:
        values[[2, 3, 5, 11]], values[9] = 0.0, -0.0
    one = latent(values.clone(), zero)
    before, open_windows = bits_of(one.weight), dict.fromkeys([])
    clean = torch.where(values == 0, float(zero or 1), values).sign()

    def read():
        return torch.where(one.weight == 0, float(zero or 1), one.weight).sign()

    for window in [*SETS, *order]:
        if window in open_windows:
            del open_windows[window]
            assert one.restore(window) is None
        else:
            open_windows[window] = None
            assert one.flip(window, torch.tensor(SETS[window])) is None
        wrong = set()
        for name in open_windows:
            wrong ^= set(SETS[name])
        assert (read() != clean).nonzero().squeeze(1).tolist() == sorted(wrong)
        copy = one.clean_copy()
        assert torch.equal(bits_of(copy), before)
    assert torch.equal(bits_of(one.weight), before)


@every_float
@pytest.mark.parametrize("zero", [1, -1])
@pytest.mark.parametrize("largest", [0.0, 1.0, 4e6, torch.inf, torch.nan])
def test_zeros_read_as_the_opposite_by_something_small(dtype, zero, largest):
    """Next to the largest weight it is small, but survives a sum with it, as in a layer that rescales."""
    values = torch.zeros(8).to(dtype)
    values[1], values[2] = largest, -0.0
    one = latent(values, zero)
    before, zeros = bits_of(one.weight), torch.tensor([0, *range(2, 8)])
    one.flip("a", zeros)
    stand_ins, scale = one.weight[zeros], values[1] if values[1].isfinite() and values[1] > 0 else values.new_ones(())
    assert (stand_ins.sign() == -zero).all()
    assert (stand_ins.double().abs() <= 8 * torch.finfo(dtype).eps * scale.double()).all()
    assert (scale + stand_ins.abs() > scale).all()
    assert torch.equal(bits_of(one.weight[1]), before[1])
    assert one.restore("a") is None
    assert torch.equal(bits_of(one.weight), before)


def test_zeros_in_layers_that_read_the_sign_bit_are_flipped_by_it():
    one = latent(torch.tensor([0.0, -0.0]))
    one.flip("a", torch.tensor([0, 1]))
    assert one.weight.signbit().tolist() == [True, False]
    assert one.weight.tolist() == [0, 0]


IN_PLACE = {
    "scale": lambda w: w.mul_(0.5),
    "grow": lambda w: w.mul_(3.0),
    "clamp": lambda w: w.clamp_(-0.3, 0.3),
    "copysign": lambda w: w.copysign_(w),
    "nothing": lambda w: w.add_(0.0),
}
THROUGH = {
    "weight": lambda w: w,
    "data": lambda w: w.data,
    "numpy": lambda w: torch.from_numpy(w.detach().numpy()),
    "storage": lambda w: torch.empty(0).set_(w.untyped_storage(), 0, w.shape),
}


@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize("write", IN_PLACE)
@pytest.mark.parametrize("check", [False, True])
def test_values_that_keep_all_signs_stay_with_the_signs_put_back(write, through, check):
    one, expected = latent(uniform(40)), uniform(40)
    one.flip("a", torch.arange(0, 40, 3))
    IN_PLACE[write](THROUGH[through](one.weight))
    assert one.restore("a", check) is None
    assert torch.equal(bits_of(one.weight), bits_of(IN_PLACE[write](expected)))


@pytest.mark.parametrize("through", THROUGH)
def test_overwritten_bits_are_counted_and_stay_as_they_were_written(through):
    """Torch counts only writes to the weight itself; all others are seen where the bits are compared."""
    one, written = latent(uniform(40)), uniform(40, seed=5)
    indices = torch.arange(0, 40, 3)
    clean = bits_of(one.weight)
    one.flip("a", indices)
    flipped = one.weight.clone()
    THROUGH[through](one.weight)[:20] = written[:20]
    lost = [i for i in indices.tolist() if i < 20 and (written[i] < 0) != (flipped[i] < 0)]
    assert one.restore("a", check=through != "weight") == f"fc.weight: {len(lost)} flipped bits were overwritten"
    assert 0 < len(lost) < 7
    assert torch.equal(one.weight[lost], written[lost])
    assert torch.equal(bits_of(one.weight)[20:], clean[20:])
    assert not one.flipped


@pytest.mark.parametrize("through", THROUGH)
def test_an_update_in_the_window_is_an_error_also_where_no_sign_changes(through):
    """A step down the gradient would be one up on flipped weights."""
    one = latent(uniform(40))
    one.flip("a", torch.arange(0, 40, 3))
    step = 0.01 * torch.randn(40, generator=torch.Generator().manual_seed(1))
    THROUGH[through](one.weight).sub_(step)
    assert one.restore("a", check=through != "weight") == "fc.weight: flipped bits were updated"


@pytest.mark.parametrize("replace", ["data", "set_"])
def test_replaced_memory_is_an_error_and_stays_as_it_is(replace):
    one, new = latent(uniform(12)), uniform(12, seed=3)
    one.flip("a", torch.arange(0, 12, 2))
    if replace == "data":
        one.weight.data = new.clone()
    else:
        one.weight.set_(new.clone())
    assert one.restore("a") == "fc.weight: its memory was replaced"
    assert torch.equal(one.weight, new)


def test_memory_that_is_replaced_between_windows_is_the_weight_from_then_on():
    one, new = latent(uniform(12)), uniform(12, seed=3)
    one.flip("a", torch.tensor([1]))
    one.restore("a")
    one.weight.data = new.clone()
    one.flip("a", torch.tensor([1]))
    assert flipped_bits(one.weight, bits_of(new)) == [1]
    assert one.restore("a") is None
    assert torch.equal(one.weight, new)


@pytest.mark.parametrize("index", [2, 3], ids=["of the first window", "of the second"])
def test_a_write_under_several_windows_is_reported_once_and_undoes_no_other_bit(index):
    one = latent(uniform(12))
    before = bits_of(one.weight)
    one.flip("a", torch.arange(0, 12, 2))
    one.flip("b", torch.arange(0, 12, 3))
    one.weight[index] = -5.0 * one.weight[index].sign()
    written = one.weight[index].clone()
    assert one.restore("a") == "fc.weight: 1 flipped bits were overwritten"
    assert one.weight[index] == written
    assert one.restore("b") is None
    assert one.weight[index] == written
    rest = torch.arange(12) != index
    assert torch.equal(bits_of(one.weight)[rest], before[rest])


def test_an_overwritten_stand_in_of_a_zero_stays_as_it_was_written():
    one = latent(torch.zeros(4), zero=1)
    one.flip("a", torch.tensor([0, 2]))
    one.weight[2] = 0.25
    assert one.restore("a") == "fc.weight: 1 flipped bits were overwritten"
    assert one.weight.tolist() == [0, 0, 0.25, 0]


def test_weights_made_in_inference_mode_are_flipped_and_restored():
    with torch.inference_mode():
        one = latent(uniform(12))
        before = bits_of(one.weight)
        one.flip("a", torch.tensor([3]))
        assert flipped_bits(one.weight, before) == [3]
        one.weight[3] = -one.weight[3]
        assert one.restore("a") == "fc.weight: 1 flipped bits were overwritten"


@pytest.mark.parametrize("indices", [[0, 10**6], [-(10**6)]], ids=str)
def test_an_index_out_of_range_is_an_error_that_flips_nothing(indices):
    one = latent(uniform(12))
    before = bits_of(one.weight)
    with pytest.raises((IndexError, RuntimeError)):
        one.flip("a", torch.tensor(indices))
    assert torch.equal(bits_of(one.weight), before)
    assert one.restore("a") is None
    assert torch.equal(bits_of(one.weight), before)


def stopped_at(line, function):
    """Call the function, with a KeyboardInterrupt at this line of its module, counted as they run; say if it came."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename != latent_weight.__file__:
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


CHANGES = {
    "flip": lambda one: one.flip("b", torch.tensor([2, 3, 5, 8])),
    "restore": lambda one: one.restore("a"),
    "clean copy": lambda one: one.clean_copy(),
}


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("zero", [None, 1])
@pytest.mark.parametrize("change", CHANGES)
def test_an_interrupt_at_any_line_leaves_what_the_next_restore_puts_right(change, zero, overlapping):
    """A clean copy, as for a checkpoint that a signal handler saves, is clean at each of these lines too."""
    values, line, flips_seen = uniform(12), 0, set()
    values[[2, 6, 9]] = 0.0
    before = bits_of(values)
    while True:
        line += 1
        one = latent(values.clone(), zero)
        if change == "restore" or overlapping:
            one.flip("a", torch.tensor([1, 2, 3, 4, 9]))
        if change == "restore" and overlapping:
            one.flip("b", torch.tensor([2, 3, 5, 8]))
        stopped = stopped_at(line, lambda one=one: CHANGES[change](one))
        flips_seen.add(str(one.weight.signbit().tolist()))
        assert torch.equal(bits_of(one.clean_copy()), before), line
        assert one.restore("a") is None
        assert one.restore("b") is None
        assert torch.equal(bits_of(one.weight), before), line
        assert not one.flipped
        if not stopped:
            break
    assert line > 15
    assert len(flips_seen) == 1 if change == "clean copy" else len(flips_seen) > 1
