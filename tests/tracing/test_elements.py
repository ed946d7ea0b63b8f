"""Which elements of parameters a tensor stands for, followed through what torch does with tensors."""

import pytest
import torch
from torch import nn

from bnnft.tracing.elements import Elements, covers, offset, spreads, storage_of
from bnnft.tracing.provenance import Provenance


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.between, self.b = (nn.Parameter(torch.randn(4, 6)) for _ in range(3))


def whole(model):
    """Return the places of the elements of a and b."""
    return torch.arange(24).view(4, 6), torch.arange(48, 72).view(4, 6)


MOVES = {
    "itself": lambda a, b: a,
    "transposed": lambda a, b: a.t(),
    "permuted": lambda a, b: b.view(2, 2, 6).permute(2, 0, 1),
    "viewed": lambda a, b: b.view(3, 8),
    "viewed in another order": lambda a, b: b.t().reshape(3, 8),
    "flattened": lambda a, b: b.t().flatten(),
    "row": lambda a, b: b[2],
    "rows": lambda a, b: a[1:3],
    "column": lambda a, b: b[:, 3],
    "every other": lambda a, b: b[:, ::2],
    "chosen": lambda a, b: b[[3, 0, 0]],
    "index_select": lambda a, b: a.index_select(1, torch.tensor([5, 2])),
    "chunk": lambda a, b: b.chunk(2)[1],
    "split": lambda a, b: a.split([1, 5], 1)[1],
    "unbind": lambda a, b: b.unbind(1)[4],
    "iterated": lambda a, b: list(b)[3],
    "transposed data": lambda a, b: b.data.T,
    "matrix": lambda a, b: b.mT,
    "expanded": lambda a, b: b[None].expand(3, 4, 6),
    "repeated": lambda a, b: b.repeat(2, 1),
    "rolled": lambda a, b: b.roll(1, 0),
    "turned": lambda a, b: b.flip(0),
    "joined": lambda a, b: torch.cat([b, a]),
    "stacked": lambda a, b: torch.stack([a, b], 1),
    "strided": lambda a, b: b.as_strided((2, 3), (6, 2), 1),
    "unfolded": lambda a, b: b.unfold(1, 3, 2),
    "copied": lambda a, b: b.t().contiguous(),
    "in another format": lambda a, b: b.t().double().half(),
    "computed": lambda a, b: (b.t() * 2 + 1).exp(),
    "broadcast": lambda a, b: b[:, None] + torch.zeros(4, 3, 6),
    "compared": lambda a, b: (b.t() > 0).float(),
    "twice": lambda a, b: b.t()[1:3].t().reshape(2, 4),
}


def placed(model, function):
    with Provenance(model) as mode:
        result = function(model.a, model.b)
        with torch._C.DisableTorchFunction():
            elements = mode.origins.elements(result)
            assert elements is not None
            places = elements.places(mode.origins, result.shape, result.device)
            return places, elements.owners(mode.origins), elements, mode.origins, result


@pytest.mark.parametrize("function", MOVES.values(), ids=MOVES)
def test_elements_are_where_torch_moves_them(function):
    """The reference moves the places themselves: what is computed of them keeps their order."""
    model = Two()
    places, owners, *_ = placed(model, function)
    moved = function(*(p.double() for p in whole(model)))
    expected = moved if moved.dtype == torch.float64 and moved.max() < 72 and not is_computed(function) else None
    if expected is None:
        expected = {"broadcast": lambda b: b[:, None].expand(4, 3, 6)}.get(name_of(function), torch.t)(whole(model)[1])
    assert torch.equal(places, expected.long())
    assert owners == [name for name, low in (("a", 0), ("b", 48)) if ((places >= low) & (places < low + 24)).any()]


def name_of(function):
    return next(name for name, each in MOVES.items() if each is function)


def is_computed(function):
    return name_of(function) in ("in another format", "computed", "broadcast", "compared")


@pytest.mark.parametrize("function", MOVES.values(), ids=MOVES)
def test_positions_are_where_the_chosen_elements_lie(function):
    model = Two()
    places, _, elements, origins, result = placed(model, function)
    for name, low in (("a", 0), ("b", 48)):
        chosen = torch.arange(1, 24, 3)
        found = elements.positions(origins, name, chosen, result.numel())
        expected = torch.isin(places.flatten(), chosen + low).nonzero().squeeze(1)
        assert torch.equal(found.sort().values, expected)


LOST = {
    "reduced": lambda a, b: b.sum(0),
    "product of two": lambda a, b: a @ b.t(),
    "of both": lambda a, b: a + b,
    "of two orders": lambda a, b: torch.cat([b[:, :3], b[:, 3:]], 0)[:4, :] + b[:, 3:],
}


@pytest.mark.parametrize("function", LOST.values(), ids=LOST)
def test_what_stands_for_no_element_has_none(function):
    with Provenance(Two()) as mode:
        result = function(mode.model.a, mode.model.b)
        with torch._C.DisableTorchFunction():
            assert mode.origins.elements(result) is None


def test_a_rotated_weight_stands_for_itself():
    """A parameter of the same size is the only one behind it."""
    with Provenance(Two()) as mode:
        result = mode.model.b @ torch.eye(6)
        with torch._C.DisableTorchFunction():
            assert mode.origins.elements(result) == Elements("b")


def test_what_is_joined_with_constants_stands_for_elements_where_it_is_not_constant():
    with Provenance(Two()) as mode:
        result = torch.cat([torch.ones(1, 6), mode.model.b])
        with torch._C.DisableTorchFunction():
            elements = mode.origins.elements(result)
    assert elements.index[0].tolist() == [-1] * 6
    assert torch.equal(elements.index[1:], whole(mode.model)[1])


def test_elements_are_equal_where_they_are_the_same_in_the_same_order():
    index = torch.arange(6).view(2, 3)
    assert Elements("a") == Elements("a")
    assert Elements("a") != Elements("b")
    assert Elements("a", 2) != Elements("a", 3)
    assert Elements("", 0, index) == Elements("", 0, index.clone())
    assert Elements("", 0, index) != Elements("", 0, index.t())
    assert Elements("", 0, index) != Elements("", 0, index + 1)
    assert Elements("", 0, index) != Elements("")
    assert Elements("a") != "a"


def test_the_offset_of_a_parameter_counts_all_before_it():
    origins = Provenance(Two()).origins
    assert [offset(origins, name) for name in ("a", "between", "b")] == [0, 24, 48]
    with pytest.raises(KeyError, match="c"):
        offset(origins, "c")


def test_views_share_what_identifies_their_memory():
    values = torch.randn(4, 6)
    assert storage_of(values.t()[1:]) == storage_of(values) != storage_of(values.clone())
    assert isinstance(storage_of(values.to_sparse()), int)


def test_a_tensor_covers_its_memory_if_it_fills_it():
    values = torch.randn(4, 6)
    assert covers(values)
    assert covers(values.t())
    assert not covers(values[1:])
    assert not covers(values.to_sparse())


@pytest.mark.parametrize(
    ("shape", "over", "does"),
    [((3,), (2, 3), True), ((2, 1), (2, 3), True), ((), (2, 3), True), ((2,), (2, 3), False), ((2, 3), (3,), False)],
)
def test_a_shape_spreads_over_another_as_torch_broadcasts_it(shape, over, does):
    assert spreads(torch.Size(shape), torch.Size(over)) is does
