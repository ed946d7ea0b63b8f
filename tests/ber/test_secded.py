"""One error in a word is corrected, two are not; the contract is in test_error_models.py."""

from dataclasses import dataclass

import pytest
import torch

from bnnft.ber import Asymmetric, Clustered, ErrorModel, Key, Secded


@dataclass(frozen=True)
class At(ErrorModel):
    """Errors at given places of the memory."""

    places: tuple[int, ...]
    reads_bits, rate = False, 0.1

    def flips(self, weight, key):
        return torch.tensor([place for place in self.places if place < weight.numel()], dtype=torch.int64)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ((3,), []),
        ((3, 5), [3, 5]),
        ((3, 8), [3]),  # the second one is a check bit
        ((3, 13 + 2), []),  # in two words
        ((13 + 2, 13 + 3, 13 + 7), [10, 11, 15]),
        ((8, 9), []),
    ],
)
def test_words_of_eight_bits_have_five_check_bits_behind_them(places, expected):
    assert Secded(At(places), word=8).flips(torch.ones(2, 8), Key()).tolist() == expected


def test_bits_behind_the_end_of_a_weight_are_no_bits_of_it():
    assert Secded(At((0, 7)), word=8).flips(torch.ones(5), Key()).tolist() == [0]


@pytest.mark.parametrize(("word", "check_bits"), [(1, 3), (4, 4), (8, 5), (16, 6), (32, 7), (64, 8), (128, 9)])
def test_check_bits_are_those_of_the_code(word, check_bits):
    assert Secded(0.1, word).check_bits == check_bits
    assert Secded(0.1, word).overhead == check_bits / word


def test_any_two_words_differ_in_four_bits_or_more():
    """Of all 256 words of eight bits: the least distance of a code that corrects one error and sees two."""
    data = torch.tensor([[number >> bit & 1 for bit in range(8)] for number in range(256)], dtype=torch.float32)
    words = Secded(0.1, word=8)._encoded(data)
    distances = (words[:, None] != words[None]).sum(2) + 99 * torch.eye(256, dtype=torch.int64)
    assert int(distances.min()) == 4


def test_one_sided_errors_read_the_check_bits_that_are_stored():
    """With all ones wrong, a word of zeros, whose check bits are zeros too, has no error."""
    model = Secded(Asymmetric(0, 1), word=8)
    assert len(model.flips(-torch.ones(4, 8), Key())) == 0
    assert len(model.flips(torch.ones(4, 8), Key())) == 32


def test_rates_that_depend_on_what_a_word_holds_are_not_known():
    assert Secded(Asymmetric(0, 0.1)).bit_rates() is None
    assert Secded(Clustered(0.1)).bit_rates() is None
    assert Secded(0.1, scale=0.0).bit_rates() == (0, 0)
    with pytest.raises(ValueError, match="word must be an integer >= 1, got 0"):
        Secded(0.1, word=0)
