"""Binary weights are found with their owner and every use; nothing else is."""

import copy

import patterns
import pytest
import structures
import torch
import torch.nn.functional as F
from binarized import Beside, Kernel, Linear, Two
from binarizers import WIDTH, ste
from structures import STRUCTURES
from torch import nn
from uses import run

from bnnft import find_binarized_weights
from bnnft.injection.finder import Finder

every_structure = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)


def watched(model, *inputs, **options):
    """Return the finder of a model that has run once."""
    finder = Finder(model, **options)
    with finder:
        run(model, inputs)
    return finder


def names(finder):
    return [site.name for site in finder.findings.sites()]


@every_structure
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_exactly_the_parameters_that_hold_bits_are_found(structure, training):
    finder = watched(structure.model().train(training), *structure.batch(6))
    assert sorted(names(finder)) == structure.owners()
    assert not finder.findings.strangers


@every_structure
def test_they_are_found_without_a_graph_and_for_one_sample(structure):
    with torch.no_grad():
        assert sorted(names(watched(structure.model(), *structure.batch(1)))) == structure.owners()


@every_structure
def test_finding_changes_nothing(structure):
    model, inputs = structure.model(), structure.batch(6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = run(structure.model(), inputs)
    with Finder(model):
        output = run(model, inputs)
    assert torch.equal(output, expected)
    after, plain = model.state_dict(), structure.model()
    run(plain, inputs)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in plain.state_dict().items())


def alone(function, shape=(WIDTH, WIDTH)):
    torch.manual_seed(0)
    return Kernel(shape, function)


def test_learned_queries_are_no_bits_though_their_signs_are_used():
    """What is made of a product of two parameters stands for elements of neither."""

    def queried(x, a, b):
        return ste(F.linear(a, b)) @ x.t()

    torch.manual_seed(0)
    finder = watched(Beside(nn.Identity(), Two(lambda x, a, b: queried(x, a, b).t())), torch.randn(6, WIDTH))
    assert names(finder) == []


def test_bits_that_are_made_outside_of_any_module():
    model = nn.ModuleDict({"layer": nn.Linear(WIDTH, WIDTH)})
    finder = Finder(model)
    with finder:
        F.linear(torch.randn(6, WIDTH), ste(model["layer"].weight))
    assert names(finder) == ["layer.weight"]


def test_lazy_layers_are_found_when_they_have_weights():
    class Lazy(nn.LazyLinear):
        cls_to_become = Linear

    model, x = nn.Sequential(Lazy(WIDTH), nn.Linear(WIDTH, 2)), torch.randn(6, WIDTH)
    finder = Finder(model)
    with finder:
        model(x)  # as a float: torch makes the layer another class in its first forward
        model(x)
    assert names(finder) == ["0.weight"]


def test_a_parameter_of_signs_is_stored_and_other_owners_have_latents():
    model = nn.Sequential(patterns.Stored(WIDTH, WIDTH), Linear())
    where = {site.name: site.where for site in watched(model, torch.randn(6, WIDTH)).findings.sites()}
    assert where == {"0.weight": "stored", "1.weight": "made"}


@pytest.mark.parametrize("biases", [False, True])
def test_binary_biases_count_if_asked_and_are_named_if_not(biases):
    finder = watched(patterns.TorchSign(WIDTH, WIDTH), torch.randn(6, WIDTH), biases=biases)
    assert names(finder) == (["weight", "bias"] if biases else ["weight"])
    assert finder.findings.biases_left() == ([] if biases else ["bias"])


@pytest.mark.parametrize(("name", "like"), [("ste", True), ("compared", True), ("centred", False), ("drawn", False)])
def test_whether_the_bits_are_the_signs_of_the_latent(name, like):
    structure = STRUCTURES[name]
    (site,) = watched(structure.model(), *structure.batch(6)).findings.sites()
    assert site.like_latent is like


@pytest.mark.parametrize(("make", "zero"), [(lambda w: w >= 0, 1), (lambda w: w > 0, -1)], ids=[">=", ">"])
def test_what_a_layer_makes_of_zeros(make, zero):
    model = alone(lambda x, w: F.linear(x, torch.where(make(w), 1.0, -1.0)))
    model.w.data[:, ::4] = 0
    (site,) = watched(model, torch.randn(6, WIDTH)).findings.sites()
    assert site.zero == zero


SHAPES = {
    "linear": (lambda: Linear(WIDTH, 7), (6, WIDTH), WIDTH),
    "from the right": (lambda: alone(lambda x, w: x @ ste(w), (WIDTH, 7)), (6, WIDTH), WIDTH),
    "from the left": (lambda: alone(lambda x, w: ste(w) @ x.t(), (7, WIDTH)), (6, WIDTH), WIDTH),
    "convolution": (lambda: alone(lambda x, w: F.conv2d(x, ste(w)), (7, 4, 3, 3)), (6, 4, 5, 5), 36),
}


@pytest.mark.parametrize(("build", "shape", "fan_in"), SHAPES.values(), ids=SHAPES)
def test_fan_in_and_scale_of_a_neuron(build, shape, fan_in):
    (site,) = watched(build(), torch.randn(*shape)).findings.sites()
    assert (site.fan_in, site.scale) == (fan_in, None)


def test_the_scale_of_each_neuron_is_half_the_distance_of_its_values():
    structure = STRUCTURES["scaled_rows"]
    model = structure.model()
    (site,) = watched(model, *structure.batch(6)).findings.sites()
    assert torch.allclose(site.scale, model.w.abs().mean(1))


def test_find_binarized_weights_puts_buffers_and_random_streams_back():
    torch.manual_seed(0)
    model = nn.Sequential(patterns.Stochastic(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), Linear())
    before, stream = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = find_binarized_weights(model, torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0)))
    assert found == {"0.weight": model[0].weight, "2.weight": model[2].weight}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)


def test_only_what_is_named_counts():
    model = nn.Sequential(Linear(), Linear())
    assert names(watched(model, torch.randn(6, WIDTH), weights=["1.weight"])) == ["1.weight"]


def test_structures_are_named_as_they_are():
    """Each structure has an owner, so that no test above passes by comparing nothing."""
    assert all(structure.owners() for structure in STRUCTURES.values())
    assert structures.STRUCTURES is STRUCTURES
