import pytest
import torch
from torch import nn

from bnnft import binarized_weights
from bnnft.injection.sites import find_sites
from bnnft.nn import BinaryActivation, BinaryConv2d, BinaryLinear


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = BinaryConv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.sign = BinaryActivation()


class Net(nn.Module):
    """Two binarized blocks, an ordinary layer, a binarized one, and a latent weight that no rule knows."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()
        self.plain = nn.Linear(4, 4)
        self.last = BinaryLinear(4, 2)
        self.own = nn.Parameter(torch.randn(3))
        self.integer = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)


KNOWN = ["first.conv.weight", "second.conv.weight", "last.weight"]


def test_the_binarized_layers_are_found_in_module_order():
    model = Net()
    found = binarized_weights(model)
    assert list(found) == KNOWN
    assert all(found[name] is model.get_parameter(name) for name in KNOWN)


def test_a_layer_alone_has_its_weight_under_the_bare_name():
    (site,) = find_sites(BinaryLinear(4, 2))
    assert (site.name, site.layer) == ("weight", "")


def test_layer_of_a_site_is_the_module_that_holds_its_weight():
    model = Net()
    assert [site.layer for site in find_sites(model)] == ["first.conv", "second.conv", "last"]
    assert all(model.get_submodule(site.layer).weight is site.weight for site in find_sites(model))


def test_a_tied_weight_is_there_once_under_its_first_name():
    model = nn.Sequential(BinaryLinear(4, 4), BinaryLinear(4, 4), BinaryLinear(4, 4))
    model[2].weight = model[0].weight
    assert list(binarized_weights(model)) == ["0.weight", "1.weight"]


def test_a_layer_used_twice_is_there_once():
    layer = BinaryLinear(4, 4)
    assert list(binarized_weights(nn.Sequential(layer, nn.ReLU(), layer))) == ["0.weight"]


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["last.weight"], ["last.weight"]),
        (["last"], ["last.weight"]),
        (["*"], KNOWN),
        (["*.conv"], KNOWN[:2]),
        (["*.conv.weight"], KNOWN[:2]),
        (["????.weight"], ["last.weight"]),
        (["[fs]*.conv"], KNOWN[:2]),
        (["last", "first.*"], ["first.conv.weight", "last.weight"]),
        (["last", "last.weight", "la*"], ["last.weight"]),
        (["own"], ["own"]),
        (["plain.weight"], ["plain.weight"]),
        (["plain.*"], ["plain.weight", "plain.bias"]),
        (["last.bias"], ["last.bias"]),
    ],
    ids=str,
)
def test_patterns_select_by_layer_or_weight_name_and_then_among_all_parameters(patterns, names):
    assert list(binarized_weights(Net(), patterns)) == names


def test_known_and_foreign_weights_are_selected_together():
    assert set(binarized_weights(Net(), ["first.conv", "own"])) == {"first.conv.weight", "own"}


def test_position_is_the_place_among_all_parameters():
    model = Net()
    places = {name: place for place, (name, _) in enumerate(model.named_parameters())}
    assert {site.name: site.position for site in find_sites(model)} == {name: places[name] for name in KNOWN}


@pytest.mark.parametrize("patterns", [["last"], ["second.*", "last"], ["*"], ["last", "own"]], ids=str)
def test_position_does_not_depend_on_the_selection(patterns):
    model = Net()
    (alone,) = (site for site in find_sites(model) if site.name == "last.weight")
    (selected,) = (site for site in find_sites(model, patterns) if site.name == "last.weight")
    assert selected == alone


@pytest.mark.parametrize("pattern", ["lost", "last.weights", "*.gamma", "LAST", "integer", "first"])
def test_a_pattern_without_a_match_is_named_with_the_weights_there_are(pattern):
    with pytest.raises(ValueError, match="matches no parameter") as caught:
        binarized_weights(Net(), ["last", pattern])
    assert repr(pattern) in str(caught.value)
    assert str(caught.value).endswith(", ".join(KNOWN))


def test_a_pattern_without_a_match_says_none_where_no_weight_is_known():
    with pytest.raises(ValueError, match=r"'lost' matches no parameter; binarized weights of this model: none$"):
        binarized_weights(nn.Linear(2, 2), ["lost"])


def test_a_function_selects_by_name_and_parameter():
    asked = []

    def large(name, weight):
        asked.append(name)
        return weight.dim() == 4 or name == "own"

    assert list(binarized_weights(Net(), large)) == ["own", *KNOWN[:2]]
    assert asked == [name for name, _ in Net().named_parameters()]
    with pytest.raises(ValueError, match=r"weights: the function .* selects no parameter of Net"):
        binarized_weights(Net(), lambda name, weight: False)


@pytest.mark.parametrize("find", [binarized_weights, find_sites])
def test_a_string_in_place_of_a_list_is_refused(find):
    with pytest.raises(TypeError, match="weights must be a list of patterns or a function, got 'last'"):
        find(Net(), "last")


def test_a_model_without_binarized_weights_is_an_error_that_says_what_to_do():
    model = nn.Sequential(nn.Linear(2, 2), BinaryActivation())
    assert binarized_weights(model) == {}
    with pytest.raises(ValueError, match=r"Sequential has no binarized weights.*bnnft\.nn.*weights=\["):
        find_sites(model)


def test_an_empty_selection_is_an_error():
    with pytest.raises(ValueError, match=r"weights must hold at least one pattern, got \[\]"):
        find_sites(Net(), [])


def test_a_selection_is_in_module_order():
    model = nn.Sequential(nn.Linear(2, 2), BinaryLinear(2, 2))
    assert list(binarized_weights(model, ["1.weight", "0.weight"])) == ["0.weight", "1.weight"]


def test_a_weight_tied_to_an_ordinary_layer_is_selected_once():
    """Twice would turn its bits back."""
    model = nn.Sequential(nn.Embedding(4, 8), BinaryLinear(8, 4, bias=False))
    model[1].weight = model[0].weight
    assert list(binarized_weights(model, ["0.weight", "1.weight"])) == ["1.weight"]


@pytest.mark.parametrize("pattern", ["0", "1", "1.weight"])
def test_every_name_of_a_tied_weight_selects_it(pattern):
    model = nn.Sequential(BinaryLinear(4, 4), BinaryLinear(4, 4))
    model[1].weight = model[0].weight
    assert list(binarized_weights(model, [pattern])) == ["0.weight"]
