import torch
from torch import nn

from bnnft.injection.bits import Use
from bnnft.injection.findings import Findings
from bnnft.nn import BinaryLinear


def use(layer, **others):
    fields = {"fan_in": 4, "scale": None, "stored": False, "like_latent": True, "zero": 1, "written": False}
    return Use(layer=layer, **{**fields, **others})


def findings(model, **options):
    return Findings(model, dict(model.named_parameters()), **options)


def model():
    return nn.Sequential(nn.Linear(4, 4), BinaryLinear(4, 4, bias=False), nn.Linear(4, 2))


def test_known_and_seen_weights_are_sites_in_the_order_of_parameters():
    found = findings(model())
    assert [site.name for site in found.sites()] == ["1.weight"]
    found.uses["0.weight"] = use("0")
    assert [(site.name, site.position, site.layer) for site in found.sites()] == [
        ("0.weight", 0, "0"),
        ("1.weight", 2, "1"),
    ]


def test_only_what_is_selected_counts():
    found = findings(model(), weights=["2.weight"])
    found.uses["0.weight"] = use("0")
    assert [site.name for site in found.sites()] == ["2.weight"]
    assert (found.is_selective, findings(model()).is_selective) == (True, False)


def test_biases_count_if_asked_and_are_left_if_not():
    for asked in (True, False):
        found = findings(model(), biases=asked)
        found.uses["0.bias"] = use("0")
        assert ("0.bias" in [site.name for site in found.sites()]) is asked
        assert found.biases_left() == ([] if asked else ["0.bias"])


def test_what_is_made_of_several_bits_is_no_site():
    found = findings(model())
    found.uses["0.weight"] = use("0")
    found.several.add("0.weight")
    assert [site.name for site in found.sites()] == ["1.weight"]


def test_a_site_has_what_was_seen_of_its_use_but_for_what_is_known_of_its_layer():
    found = findings(model())
    scale = torch.ones(4)
    found.uses["0.weight"] = use("encoder.0", scale=scale, stored=True, like_latent=False, zero=-1)
    found.uses["1.weight"] = use("encoder.1", stored=True, like_latent=False, zero=-1)
    seen, known = found.sites()
    assert (seen.where, seen.layer, seen.like_latent, seen.zero, seen.fan_in) == ("stored", "encoder.0", False, -1, 4)
    assert seen.scale is scale
    assert (known.where, known.layer, known.like_latent, known.zero) == ("layer", "encoder.1", True, None)


def test_bits_that_are_used_as_floats_too_are_not_like_their_latent():
    found = findings(model())
    found.floats |= {"0.weight", "1.weight"}
    found.uses.update({"0.weight": use("0"), "1.weight": use("1")})
    assert [site.like_latent for site in found.sites()] == [False, False]
