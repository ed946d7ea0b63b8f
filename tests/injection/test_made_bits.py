import torch
from torch import nn

from bnnft.injection.bits import Bits, Mark
from bnnft.injection.made_bits import MadeBits
from bnnft.tracing.binary import sides_of, two_values
from bnnft.tracing.elements import Elements
from bnnft.tracing.origins import Origin, Origins

SIDES = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
OTHER = torch.tensor([[1, 1], [-1, -1]], dtype=torch.int8)


def mark(operation, owner="weight"):
    return Mark("", operation, (2, 2), (owner,))


def made(feeds, sides):
    return Bits(True, feeds, sides, Elements("weight"))


def bits():
    origins = Origins(nn.Linear(2, 2))
    return origins, MadeBits(origins)


def test_what_has_the_sides_of_bits_in_use_is_taken_for_bits_and_all_else_is_not():
    _, known = bits()
    known |= {mark("sign"): made(True, SIDES), mark("where"): made(None, SIDES.clone())}
    known |= {mark("ge"): made(None, -SIDES), mark("lt"): made(None, OTHER), mark("sign", "bias"): made(None, SIDES)}
    known.settle()
    feeds = [known[key].feeds for key in (mark("where"), mark("ge"), mark("lt"), mark("sign", "bias"))]
    assert feeds == [True, True, False, None]  # of another parameter nothing is in use
    assert all(each.sides is None and each.elements is None for each in known.values())


def test_an_operand_shows_bits_up_to_the_sign_of_its_scale():
    origins, known = bits()
    for values, shows in [(SIDES * 0.5, True), (SIDES * -2.0, True), (OTHER * 1.0, False)]:
        origins.keep(values, Origin(frozenset(["weight"])), Elements("weight"))
        found = two_values(values)
        assert known.show(values, found, made(True, sides_of(SIDES * 1.0, two_values(SIDES * 1.0)))) is shows
    assert known.show(values, found, made(True, None)) is False


def test_scales_of_any_shape_count_unless_floats_of_the_parameter_may_be_in_them():
    origins, known = bits()
    known[mark("sign")] = made(True, SIDES)
    scaled = SIDES * torch.tensor([[0.3, 2.0], [5.0, 0.7]])
    rank_one = SIDES * torch.tensor([[0.3, 0.6], [2.0, 4.0]])
    for operand in (scaled, rank_one):
        origins.keep(operand, Origin(frozenset(["weight"])), Elements("weight"))
    alone, beside = Origin(frozenset(["weight"])), Origin(frozenset(["weight"]), frozenset(["weight"]))
    assert known.scaled(scaled, [mark("sign")], alone) is not None
    assert known.scaled(scaled, [mark("sign")], beside) is None
    assert known.scaled(rank_one, [mark("sign")], beside) is not None
