"""Where bits are flipped, for each way that a user may ask for."""

import pytest
import torch
from torch import nn

from bnnft.injection.places import moved, placed
from bnnft.injection.sites import Site
from bnnft.nn import BinaryLinear


class Wrapper(nn.Module):
    def __init__(self, compiled):
        super().__init__()
        inner = nn.Linear(4, 4, bias=False)
        self.inner = torch.compile(inner, backend="eager") if compiled else inner


def site(where, like_latent=None, layer="inner"):
    return Site("inner.weight", nn.Parameter(torch.ones(4, 4)), 0, where=where, layer=layer, like_latent=like_latent)


@pytest.mark.parametrize(
    ("how", "compiled", "before", "like_latent", "after"),
    [
        ("operand", True, "made", True, "made"),
        ("operand", False, "layer", True, "layer"),
        ("latent", False, "made", True, "latent"),
        ("latent", True, "layer", None, "latent"),
        ("auto", False, "made", True, "made"),
        ("auto", True, "made", True, "latent"),
        ("auto", True, "made", None, "latent"),  # to be proven
        ("auto", True, "made", False, "made"),
        ("auto", True, "stored", True, "stored"),
        ("auto", True, "layer", True, "layer"),
    ],
)
def test_bits_are_flipped_where_they_are_made_but_for_latents_in_compiled_modules_or_if_asked(
    how, compiled, before, like_latent, after
):
    model = Wrapper(compiled)
    layer = next(name for name, module in model.named_modules() if type(module) is nn.Linear)
    (result,) = placed(model, [site(before, like_latent, layer)], how)
    assert result.where == after


def test_what_is_not_proven_in_a_layer_or_a_latent_is_flipped_where_it_is_made():
    sites = [site("layer"), site("latent")._replace(name="other")]
    fault = {"other": "other: 3 of 9 drawn bits missed, 0 others flipped"}
    assert [each.where for each in moved(sites, fault, "auto")] == ["layer", "made"]
    assert [each.where for each in sites] == ["layer", "latent"], "a copy"
    with pytest.raises(RuntimeError, match=r"other: 3 of 9 .*how='operand' flips the bits where they are made"):
        moved(sites, fault, "latent")
    with pytest.raises(RuntimeError, match=r"other: 3 of 9 .*leave them out with weights="):
        moved(moved(sites, fault, "auto"), fault, "auto")


def test_a_layer_of_ours_flips_by_itself_in_a_compiled_model_too():
    model = torch.compile(nn.Sequential(BinaryLinear(4, 4)), backend="eager")
    own = Site("0.weight", model._orig_mod[0].weight, 0, where="layer", layer="0", known=True)
    assert placed(model, [own], "auto") == [own]
