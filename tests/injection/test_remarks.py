"""Each thing is said once: where flips go, what has none."""

import torch
from torch import nn
from torch.nn import functional as F

from bnnft.ber import Independent
from bnnft.injection.finder import Finder
from bnnft.injection.remarks import Remarks


class Net(nn.Module):
    """A found weight, a binary bias, a mask of two values, and a sign of a sum of two parameters."""

    def __init__(self):
        super().__init__()
        self.fc, self.other = nn.Linear(16, 8), nn.Linear(16, 8, bias=False)

    def forward(self, x):
        bits = self.fc.weight.sign()
        mixed = (self.fc.weight + self.other.weight).sign()
        return F.linear(x, bits, self.fc.bias.sign()) + F.linear(x, mixed)


def test_where_flips_go_and_what_has_none_is_said_once():
    said, warned = [], []
    remarks, finder = Remarks(said.append, warned.append), Finder(Net())
    for _ in range(2):
        with finder:
            finder.model(torch.randn(4, 16))
        remarks.on_the_rest(finder)
    sites = finder.findings.sites()
    remarks.on_sites(sites, Independent(0.25))
    remarks.on_sites([], Independent(0.25))
    assert said == [
        "BitFlipTraining leaves binary biases alone: fc.bias; biases=True flips them",
        "BitFlipTraining: Independent(rate=0.25) on 128 bits in fc.weight (found, made)",
    ]
    (warning,) = warned
    assert "not the bits of one parameter have no flips: the model (8, 16)." in warning
