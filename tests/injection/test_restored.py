"""Whether signs came back, also where an update has changed some of them."""

import pytest
import torch
from torch import nn

from bnnft.injection.restored import DrawnBits
from bnnft.injection.sites import Site


@pytest.mark.parametrize(
    ("drawn", "changed", "stand"),
    [(40, 40, True), (40, 21, True), (40, 20, False), (40, 0, False), (20, 20, True), (19, 19, False), (0, 0, False)],
)
def test_they_stand_flipped_if_more_than_half_of_not_too_few_have_changed(drawn, changed, stand):
    weight = nn.Parameter(torch.randn(10, 10))
    bits = DrawnBits(Site("fc.weight", weight, 0, where="latent"), torch.arange(drawn))
    with torch.no_grad():
        weight.view(-1)[:changed] *= -1
        weight.view(-1)[drawn:] *= -1  # others than the drawn ones do not count
    assert bits.name == "fc.weight"
    assert bits.stand_flipped() is stand
