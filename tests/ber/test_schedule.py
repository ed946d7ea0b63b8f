"""Schedules are pure functions of step and seed; values are in their doctests."""

import pytest
from scipy.stats import kstest

from bnnft.ber import Constant, Cosine, Curriculum, Linear, Schedule, Steps, Uniform

ALL = [Constant(), Linear(10), Linear(1, start=0.5), Cosine(10), Steps({3: 0.5}), Uniform(), Curriculum(0.5, Linear(5))]
every_schedule = pytest.mark.parametrize("schedule", ALL, ids=str)


@every_schedule
def test_factors_are_fractions_and_the_same_whenever_they_are_asked_for(schedule):
    assert isinstance(schedule, Schedule)
    forwards = [schedule.factor(step, seed=1) for step in range(100)]
    assert all(0 <= factor <= 1 for factor in forwards)
    assert [schedule.factor(step, seed=1) for step in reversed(range(100))] == forwards[::-1]


@pytest.mark.parametrize("schedule", [Linear(10), Cosine(10), Linear(7, start=0.3), Cosine(7, start=0.3)], ids=str)
def test_warm_up_rises_to_the_whole_rate_and_stays(schedule):
    factors = [schedule.factor(step) for step in range(30)]
    assert factors[0] == schedule.start
    assert factors == sorted(factors)
    assert factors[schedule.steps - 1] < 1
    assert factors[schedule.steps :] == [1.0] * (30 - schedule.steps)


def test_steps_jump_where_they_say_whatever_their_order():
    factors = [Steps({5: 1.0, 2: 0.5}).factor(step) for step in range(8)]
    assert factors == [0, 0, 0.5, 0.5, 0.5, 1, 1, 1]


def test_steps_have_three_unless_they_are_given():
    assert Steps() == Steps({0: 0.25, 100: 0.5, 200: 1.0})
    assert [Steps().factor(step) for step in (0, 99, 100, 199, 200)] == [0.25, 0.25, 0.5, 0.5, 1.0]


def test_uniform_factors_are_uniform_and_differ_by_seed():
    """Kolmogorov-Smirnov; false alarm 1e-9."""
    factors = [Uniform().factor(step, seed=1) for step in range(5000)]
    assert kstest(factors, "uniform").pvalue > 1e-9
    assert factors[:5] != [Uniform().factor(step, seed=2) for step in range(5)]


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: Linear(0), ValueError, "steps must be an integer >= 1, got 0"),
        (lambda: Cosine(2.5), ValueError, "steps must be an integer >= 1, got 2.5"),
        (lambda: Linear(5, start=1.5), ValueError, r"start must be a fraction of the rate in \[0, 1\], got 1.5"),
        (lambda: Steps({}), TypeError, "factors must map one or more steps"),
        (lambda: Steps({-1: 0.5}), ValueError, "factors must have steps >= 0, got -1"),
        (lambda: Steps({0: 2}), ValueError, r"factors\[0\] must be a fraction of the rate"),
        (lambda: Curriculum(0), ValueError, "loss_below must be a number greater than 0, got 0"),
        (lambda: Curriculum(0.5, then=0.5), TypeError, "schedule must have a method factor"),
        (lambda: Curriculum(0.5, then=Linear), TypeError, "schedule must have a method factor"),
    ],
)
def test_bad_arguments_are_named(build, error, says):
    with pytest.raises(error, match=says):
        build()
