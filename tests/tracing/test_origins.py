"""What tensors are made of, by the memory that they lie in."""

import torch
from torch import nn

from bnnft.tracing.elements import Elements
from bnnft.tracing.origins import CONSTANT, MAYBE, Origin, Origins, merged


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4))
        self.tied = self.w
        self.register_buffer("scale", torch.randn(3, 1))
        self.plain, self.listed, self.named = torch.randn(2), [torch.randn(2)], {"one": torch.randn(2)}
        self.lazy = nn.LazyLinear(2)


def registered():
    origins = Origins(Holder())
    origins.register()
    return origins, origins._model


OF_W = Origin(frozenset(["w"]), frozenset(["w"]))


def test_parameters_are_known_by_their_first_name_and_lazy_ones_not_yet():
    origins, model = registered()
    assert list(origins.parameters) == ["w"]
    assert origins.of(model.w) == origins.of(model.w.t()) == origins.of(model.w.data) == OF_W
    assert origins.owner(model.w[1]) == "w"
    assert origins.elements(model.w) == Elements("w")


def test_what_a_module_holds_is_constant():
    origins, model = registered()
    held = model.scale, model.plain, model.listed[0], model.named["one"]
    assert [origins.of(tensor) for tensor in held] == [CONSTANT] * 4


def test_everything_else_is_of_the_batch():
    origins, model = registered()
    assert origins.of(torch.randn(3, 4)) is None
    assert origins.of(model.w.clone()) is None
    assert origins.of(nn.Parameter(torch.randn(2))) is None


def test_a_tensor_that_hangs_on_a_parameter_is_constant_but_its_gradient_is_not():
    model = Holder()
    model.w.org, model.w.grad = torch.randn(3, 4), torch.randn(3, 4)
    origins = Origins(model)
    origins.register()
    assert origins.of(model.w.org) == CONSTANT
    assert origins.of(model.w.grad) is None


def test_a_parameter_that_comes_later_is_found_by_its_name():
    origins, model = registered()
    model.new = nn.Parameter(torch.randn(5))
    assert origins.of(model.new) == Origin(frozenset(["new"]), frozenset(["new"]))
    assert origins.owner(model.new) == "new"


def test_what_is_forgotten_is_of_the_batch():
    origins, _ = registered()
    made = torch.randn(3, 4)
    origins.keep(made, OF_W, Elements("w"))
    assert (origins.of(made), origins.elements(made)) == (OF_W, Elements("w"))
    origins.forget(made)
    assert (origins.of(made), origins.elements(made)) == (None, None)


def test_elements_are_of_a_layout_and_stay_where_values_change_and_go_where_memory_is_new():
    origins, _ = registered()
    made = torch.randn(3, 4)
    origins.keep(made, CONSTANT, Elements("w"))
    assert origins.elements(made.t()) is None
    origins.view(made.t(), Elements("", 0, torch.arange(12).view(4, 3)))
    origins.change(made, OF_W)
    assert origins.elements(made) == Elements("w")
    assert origins.elements(made.t()) == Elements("", 0, torch.arange(12).view(4, 3))
    origins.keep(made, CONSTANT)
    assert origins.elements(made) is None
    assert origins.elements(made.t()) is None


def test_a_parameter_that_is_given_other_memory_stays_one():
    origins, model = registered()
    before = model.w.untyped_storage()._cdata
    model.w.data = torch.randn(3, 4)
    origins.moved(model.w, before)
    assert origins.of(model.w) == OF_W
    assert origins.written == {"w"}


def test_what_is_made_of_several_is_made_of_all_that_they_are_made_of():
    one = Origin(frozenset("a"), frozenset("a"), frozenset([1]))
    other = Origin(frozenset("b"), frozenset(), frozenset([2]))
    assert merged([one, other, None]) == Origin(frozenset("ab"), frozenset("a"), frozenset([1, 2]))
    assert merged([]) == CONSTANT
    assert merged([CONSTANT, MAYBE]).unsure
    assert not merged([CONSTANT, one]).unsure


def test_nothing_is_kept_after_it_was_cleared():
    origins, model = registered()
    origins.clear()
    assert origins.owner(model.w) is None
    assert origins.of(model.scale) is None
