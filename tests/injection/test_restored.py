"""Whether signs came back, also where an update has changed some of them."""

import pytest
import torch
from torch import nn

from bnnft.injection.restored import Restored
from bnnft.injection.sites import Site


@pytest.mark.parametrize(
    ("drawn", "changed", "stand"),
    [(40, 40, True), (40, 21, True), (40, 20, False), (40, 0, False), (20, 20, True), (19, 19, False), (0, 0, False)],
)
def test_they_stand_flipped_if_more_than_half_of_not_too_few_have_changed(drawn, changed, stand):
    weight = nn.Parameter(torch.randn(10, 10))
    restored, site = Restored(), Site("fc.weight", weight, 0, where="latent")
    restored.expect([site, site._replace(name="other", where="made")], {"fc.weight": torch.arange(drawn)})
    with torch.no_grad():
        weight.view(-1)[:changed] *= -1
        weight.view(-1)[drawn:] *= -1  # others than the drawn ones do not count
    faults = restored.faults()
    assert list(faults) == (["fc.weight"] if stand else [])
    assert not stand or faults["fc.weight"].startswith("fc.weight: the flipped signs stand although")
    assert restored.faults() == {}, "said once"
