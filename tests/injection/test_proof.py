"""Sites are proven by enough of their own flips, and what does not show them is caught."""

import pytest
import torch
import torch.nn.functional as F
from binarized import Linear
from binarizers import WIDTH, ste
from torch import nn
from uses import run, some_flips

from bnnft.ber import Independent, Key
from bnnft.injection.flipped import Injection
from bnnft.injection.proof import Proof
from bnnft.injection.sites import Site, first_names
from bnnft.injection.training import BitFlips
from bnnft.nn import BinaryLinear


def site_of(bits=10_000):
    return Site("w", nn.Parameter(torch.ones(bits)), 0)


def shown(proof, site, count):
    """Let a watched batch have shown so many flips of a site."""
    proof.expect([site], {"w": torch.arange(count)}, {"w": "w"})
    proof._shown.add("w")
    proof.conclude([site])


def test_a_site_is_proven_by_a_hundred_flips_over_as_many_batches_as_it_takes():
    proof, site = Proof(), site_of()
    for seen in range(0, 100, 5):
        assert proof.due(site, torch.arange(5)), seen
        shown(proof, site, 5)
    assert not proof.due(site, torch.arange(5))


def test_a_small_site_is_proven_by_as_many_flips_as_it_has_bits():
    proof, site = Proof(), site_of(8)
    shown(proof, site, 4)
    assert proof.due(site, torch.arange(1))
    shown(proof, site, 4)
    assert not proof.due(site, torch.arange(1))


def test_it_is_proven_anew_where_four_times_the_share_is_flipped():
    proof, site = Proof(), site_of()
    shown(proof, site, 100)
    assert not proof.due(site, torch.arange(400))
    assert proof.due(site, torch.arange(401))
    shown(proof, site, 401)
    assert not proof.due(site, torch.arange(1603))


def test_a_batch_without_flips_or_in_which_the_site_did_not_run_proves_nothing():
    proof, site = Proof(), site_of()
    assert not proof.due(site, torch.arange(0))
    for _ in range(3):
        proof.expect([site], {"w": torch.arange(1000)}, {"w": "w"})
        proof.conclude([site])
    assert proof.due(site, torch.arange(100))


def test_a_fault_takes_back_what_was_proven():
    proof, site = Proof(), site_of()
    shown(proof, site, 100)
    proof.expect([site], {"w": torch.arange(100)}, {"w": "w"})
    proof.faults["w"] = "w: others"
    proof.conclude([site])
    assert proof.due(site, torch.arange(100))


def watched(model, x, flips, lies=None):
    """Return the faults that a proof finds in a batch with these flips, given what it is told that was drawn."""
    injection = Injection(model)
    with injection.finder:
        run(model, (x,))
    injection.learn()
    injection.finder.bits.settle()
    proof = injection.proof
    with injection.under(flips, Independent(0.3), Key(0), watch=True):
        if lies is not None:
            proof.expect(injection.sites, lies, first_names(injection.model))
        run(model, (x,))
    proof.conclude(injection.sites)
    return proof


@pytest.mark.parametrize("layer", [BinaryLinear, Linear])
def test_exact_flips_are_no_fault(layer):
    torch.manual_seed(0)
    model = layer(WIDTH, WIDTH)
    flips = some_flips(model, ["weight"])
    proof = watched(model, torch.randn(6, WIDTH), flips)
    assert proof.faults == {}
    assert not proof.due(Injection(model, weights=["weight"]).sites[0], flips["weight"])


def test_missed_and_other_flips_of_an_own_layer_are_counted():
    """Seven of those that were drawn are not shown, and three others are."""
    torch.manual_seed(0)
    model = BinaryLinear(WIDTH, WIDTH)
    drawn = torch.arange(0, 100)
    made = torch.cat([drawn[7:], torch.tensor([200, 300, 399])])
    proof = watched(model, torch.randn(6, WIDTH), {"weight": made}, {"weight": drawn})
    assert proof.faults == {"weight": "weight: 7 of 100 drawn bits missed, 3 others flipped"}
    assert proof.due(Injection(model).sites[0], drawn)


class Rescues(nn.Module):
    """Makes bits of its weight, but computes with others."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.register_buffer("mask", torch.randn(WIDTH, WIDTH).sign())
        self.corrects = False

    def forward(self, x):
        b = ste(self.w)
        if self.corrects:
            b = b * self.mask
        return F.linear(x, b)


def test_a_layer_that_computes_with_other_bits_than_it_has_made_is_a_fault():
    torch.manual_seed(0)
    model, x = Rescues(), torch.randn(6, WIDTH)
    training = BitFlips(model, 0.3)
    with training.batch():
        model(x)
    model.corrects = True
    fault = r"do not compute with the drawn flips \(w: the batch met other bits"
    with pytest.raises(RuntimeError, match=fault), training.batch():
        model(x)


class Twice(nn.Module):
    """Uses the weight of a layer of ours by hand too."""

    def __init__(self):
        super().__init__()
        self.a = BinaryLinear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return self.a(x) + F.linear(x, ste(self.a.weight))


@pytest.mark.parametrize("rate", [0.3, 0.01])
def test_a_second_use_of_an_own_layers_weight_has_the_flips_as_soon_as_one_has_shown_that_it_lacks_them(rate):
    torch.manual_seed(0)
    model, exact = Twice(), []
    training = BitFlips(model, rate)
    for x in torch.randn(8, 6, WIDTH):
        flips = Independent(rate).flips(model.a.weight, Key(0, training.batches, 0, purpose="training"))
        with training.batch():
            output = model(x)
        bits = torch.where(model.a.weight >= 0, 1.0, -1.0)
        bits.view(-1)[flips] *= -1
        exact.append(torch.allclose(output, 2 * F.linear(x, bits), atol=1e-4))
    assert len(flips) > 0
    assert all(exact[2:])


def test_steady_batches_are_not_watched():
    torch.manual_seed(0)
    model = nn.Sequential(BinaryLinear(WIDTH, WIDTH))
    training, watched_ = BitFlips(model, 0.3), []
    for x in torch.randn(6, 6, WIDTH):
        with training.batch():
            watched_.append(training.injection.finder.proof is not None)
            model(x)
    assert watched_ == [True, False, False, False, False, False]
