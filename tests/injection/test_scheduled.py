"""The error model of each batch is at the rate that the schedule says."""

import pytest

from bnnft.ber import ErrorModel, Independent
from bnnft.ber.schedule import Constant, Curriculum, Linear
from bnnft.injection.scheduled import ScheduledErrors


@pytest.mark.parametrize("schedule", [None, Constant()], ids=["none", "constant"])
def test_without_a_schedule_it_is_at_its_whole_rate_always(schedule):
    errors = ScheduledErrors(Independent(0.1), schedule, 0)
    assert [errors.at(batch) for batch in (0, 7, 10**6)] == [Independent(0.1)] * 3
    assert errors.factor(5) == 1.0
    assert errors.schedule is None


def test_a_constant_schedule_needs_no_rate():
    class Own(ErrorModel):
        def flips(self, weight, key):
            return weight.new_zeros(0, dtype=int)

    own = Own()
    assert ScheduledErrors(own, Constant(), 0).at(3) is own
    with pytest.raises(TypeError, match="has no rate to set"):
        ScheduledErrors(own, Linear(10), 0)


def test_the_rate_is_a_multiple_of_the_whole_one():
    errors = ScheduledErrors(Independent(0.2), Linear(4), 0)
    for batch in range(6):
        assert errors.at(batch).rate == pytest.approx(0.2 * Linear(4).factor(batch, 0))


def test_an_error_model_is_kept_as_long_as_its_rate_stays():
    """A chip draws its cells once for a rate."""
    errors = ScheduledErrors(Independent(0.2), Linear(2), 0)
    assert errors.at(5) is errors.at(6)
    assert errors.at(0) is not errors.at(5)


def test_a_curriculum_waits_for_a_low_loss_and_begins_in_the_next_batch():
    schedule = Curriculum(0.5)
    errors = ScheduledErrors(Independent(0.2), schedule, 0)
    assert errors.waits
    assert errors.factor(3) == 0.0
    assert errors.at(3).rate == 0.0
    errors.learn(0.7, 4)
    errors.learn(0.5, 5)
    assert errors.waits
    errors.learn(0.4, 6)
    assert (errors.waits, errors.start) == (False, 6)
    assert errors.factor(8) == schedule.factor(2, 0)
    errors.learn(0.1, 9)
    assert errors.start == 6


def test_no_schedule_is_an_error():
    with pytest.raises(TypeError, match="schedule"):
        ScheduledErrors(Independent(0.2), "linear", 0)
