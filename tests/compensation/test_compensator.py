"""What is left of sums, and by how much they are shifted, whatever the statistics were gathered at."""

import pytest
import torch
from networks import small_net

from bnnft.ber import Asymmetric, Independent
from bnnft.compensation import Method
from bnnft.compensation.compensator import Compensator
from bnnft.injection.gathered import take_down


def compensator(method, **gathered):
    model = small_net().eval()
    take_down(model, gathered.get("at", {}))
    found = Compensator(model, method)
    found.look(lambda: model(torch.randn(4, 12)))
    return found


@pytest.mark.parametrize("then", [(0.0, 0.0), (0.1, 0.1), (0.05, 0.3)])
@pytest.mark.parametrize("now", [(0.0, 0.0), (0.2, 0.2), (0.3, 0.1)])
def test_a_corrected_sum_is_that_of_the_statistics_on_average(now, then):
    """Of means: what reads as (c s + d X) becomes (c' s + d' X), for any s and X."""
    found = compensator(Method("input_sum"), at={"0.weight": then})
    correction = found.corrections(Asymmetric(*now)).get("0", [None])[0]
    s, x = 3.0, 7.0
    read = (1 - sum(now)) * s + (now[0] - now[1]) * x
    if correction is not None:
        read = (read - correction.shift * x) / correction.left
    assert read == pytest.approx((1 - sum(then)) * s + (then[0] - then[1]) * x)
    assert found.is_needed(Asymmetric(*now)) == (now != then or now != (0.0, 0.0))


def test_the_argument_stands_in_place_of_what_was_taken_down():
    found = compensator(Method("thresholds", gathered_at=0.2), at={"0.weight": (0.1, 0.1)})
    assert found.corrections(Independent(0.2)) == {}


def test_statistics_of_unknown_errors_are_an_error():
    found = compensator(Method("thresholds"), at={"0.weight": None})
    with pytest.raises(ValueError, match=r"behind 0.weight were gathered under errors whose rates are not known"):
        found.corrections(Independent(0.2))
