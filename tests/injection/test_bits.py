"""What is known of tensors that hold bits."""

import pytest
import torch

from bnnft.injection.bits import few_values

SIGNS = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).sign()
OTHERS = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)).sign()


@pytest.mark.parametrize(
    ("values", "most", "few"),
    [
        (SIGNS, 2, True),
        (SIGNS * torch.arange(1, 7)[:, None], 2, True),
        (0.5 * SIGNS + 0.3 * OTHERS, 4, True),
        (0.5 * SIGNS + 0.3 * OTHERS, 2, False),
        (torch.randn(6, 40, generator=torch.Generator().manual_seed(2)), 16, False),
        (torch.zeros(6, 40), 2, True),
        (SIGNS[:, :2], 2, False),  # two values of two show nothing
    ],
    ids=["signs", "scaled rows", "two bases", "more than said", "floats", "zeros", "few columns"],
)
def test_the_lines_of_a_sum_of_bits_hold_few_values(values, most, few):
    assert few_values(values, most) is few
