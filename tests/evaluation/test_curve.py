import math

import numpy as np
import pytest
import torch
from scipy import stats

from bnnft import BERCurve
from bnnft.evaluation.curve import checked_drop, interval, student


def curve(rates, means, clean=0.9, axis="rate"):
    return BERCurve(tuple(rates), torch.tensor([[mean, mean] for mean in means], dtype=torch.float64), clean, axis)


def test_mean_and_deviation_are_over_the_maps_of_each_rate():
    accuracy = torch.rand(3, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    measured = BERCurve((0.0, 0.1, 0.2), accuracy, clean=0.9)
    assert measured.maps == 5
    assert measured.mean == pytest.approx(np.mean(accuracy.numpy(), axis=1))
    assert measured.std == pytest.approx(np.std(accuracy.numpy(), axis=1, ddof=1))


@pytest.mark.parametrize("maps", [2, 5, 20])
def test_interval_is_the_student_t_interval_of_the_mean(maps):
    accuracy = torch.rand(2, maps, dtype=torch.float64, generator=torch.manual_seed(0))
    measured = BERCurve((0.0, 0.1), accuracy, clean=0.9)
    for found, row in zip(measured.interval, accuracy.numpy(), strict=True):
        expected = stats.t.interval(0.95, maps - 1, row.mean(), stats.sem(row))
        assert found == pytest.approx(np.clip(expected, 0, 1))
        assert interval(torch.tensor(row), bounds=None) == pytest.approx(expected)


def test_one_map_has_a_mean_but_no_deviation_and_no_interval():
    measured = BERCurve((0.0, 0.1), torch.tensor([[0.9], [0.5]], dtype=torch.float64), clean=0.9)
    assert measured.mean == [0.9, 0.5]
    assert all(math.isnan(value) for value in (*measured.std, *measured.interval[0], *measured.interval[1]))


@pytest.mark.parametrize(
    ("rates", "means", "tolerable"),
    [
        ([0, 0.1, 0.2], [0.9, 0.9, 0.7], 0.15),  # half of the fall is the drop
        ([0, 0.1, 0.2, 0.3], [0.9, 0.85, 0.7, 0.9], 0.1 + 0.1 / 3),  # the first fall counts, not a later rise
        ([0, 0.1, 0.2], [0.9, 0.95, 0.75], 0.175),  # interpolated from above the clean accuracy
        ([0, 0.1, 0.2], [0.9, 0.88, 0.85], 0.2),  # never falls: the highest tested rate
        ([0, 0.1, 0.2], [0.9, 0.8, 0.7], 0.1),  # the drop is exactly reached
        ([0, 0.1, 0.2], [0.9, 0.85, 0.8], 0.2),
        ([0, 0.1, 0.2], [0.9, 0.8, 0.8], 0.2),
        ([0.1, 0.2], [0.5, 0.4], 0.025),  # falls before the first rate: interpolated from the clean accuracy at 0
        ([0.1, 0.2], [0.9, 0.7], 0.15),
        ([0, 0.1], [0.5, 0.4], 0.0),  # falls at the first rate, 0
        ([0.3], [0.9], 0.3),
        ([0.3], [0.7], 0.15),
    ],
    ids=str,
)
def test_tolerable_ber_is_the_rate_where_the_mean_first_falls_below_clean_less_drop(rates, means, tolerable):
    assert curve(rates, means).tolerable_ber(drop=0.1) == pytest.approx(tolerable, abs=1e-9)


def test_rounding_does_not_make_a_drop_of_the_stated_size_larger():
    assert 0.8 - 0.1 > 0.7
    assert curve([0, 0.1, 0.2], [0.8, 0.7, 0.7], clean=0.8).tolerable_ber(drop=0.1) == 0.2


@pytest.mark.parametrize(("drop", "tolerable"), [(0, 0.0), (0.5, 0.1 / 0.9 * 0.5), (0.9, 0.1), (1, 0.1)])
def test_tolerable_ber_grows_with_the_drop(drop, tolerable):
    assert curve([0, 0.1], [0.9, 0.0]).tolerable_ber(drop) == pytest.approx(tolerable, abs=1e-9)


def test_tolerable_ber_allows_a_hundredth_unless_told_otherwise():
    measured = curve([0, 0.1], [0.9, 0.5])
    assert measured.tolerable_ber() == measured.tolerable_ber(0.01)


@pytest.mark.parametrize("drop", [-0.1, 1.5, math.nan])
def test_tolerable_ber_refuses_a_drop_that_is_no_fraction(drop):
    with pytest.raises(ValueError, match=r"drop must be a fraction in \[0, 1\], got"):
        curve([0, 0.1], [0.9, 0.5]).tolerable_ber(drop)


def test_plot_draws_mean_and_band_in_percent():
    figure, axes = curve([0, 0.1], [0.9, 0.5]).plot(label="net")
    assert axes.figure is figure
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[0, 90], [10, 50]])
    assert axes.get_xlabel() == "bit error rate (%)"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["net"]
    assert curve([0, 1], [0.9, 0.5], axis="volts").plot(axes)[1].get_xlabel() == "volts"


def test_intervals_of_accuracies_stay_fractions():
    """Of two good dies and a dead one Student's t alone goes from -0.68 to 1.85."""
    measured = BERCurve((0.1,), [[0.88, 0.88, 0.0]], clean=0.9)
    assert measured.interval == [(0.0, 1.0)]
    assert interval(measured.values[0], bounds=(-math.inf, math.inf)) == pytest.approx((-0.675, 1.849), abs=1e-3)
    free = BERCurve((0.1,), [[0.88, 0.88, 0.0]], clean=0.9, score="loss")
    assert free.interval[0][0] < 0
    assert BERCurve((0.1,), [[0.88, 0.88, 0.0]], 0.9, score="loss", bounds=(0, math.inf)).interval[0][0] == 0


@pytest.mark.parametrize("freedom", [1, 4, 30])
def test_student_is_the_quantile_of_its_distribution(freedom):
    assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom))


def test_quantiles_are_over_the_maps_of_each_rate():
    values = torch.rand(3, 7, dtype=torch.float64, generator=torch.manual_seed(0))
    measured = BERCurve((0.0, 0.1, 0.2), values, clean=0.9)
    expected = np.quantile(values.numpy(), [0.05, 0.5, 0.95], axis=1).T
    np.testing.assert_allclose(measured.quantiles(), expected)
    assert measured.quantiles([1.0]) == [(float(row.max()),) for row in values]
    with pytest.raises(ValueError, match=r"levels must be fractions in \[0, 1\], got \[5\]"):
        measured.quantiles([5])


@pytest.mark.parametrize(
    ("axis", "rates", "means", "tolerable", "bound"),
    [
        ("rate", [0, 0.1], [0.9, 0.9], 0.1, True),
        ("rate", [0, 0.1], [0.9, 0.7], 0.05, False),
        ("rate", [0, 0.1], [0.9, math.nan], math.nan, False),
        ("rate", [0, 0.1, 0.2], [0.9, 0.7, math.nan], 0.05, False),  # what comes after the fall does not matter
        ("rate", [0, 0.1, 0.2], [0.9, math.nan, 0.7], math.nan, False),
        ("scale", [1, 2], [0.7, 0.5], 0.5, False),
        ("voltage", [0.55, 0.53, 0.5], [0.9, 0.7, 0.2], 0.54, False),
        ("voltage", [0.55, 0.5], [0.9, 0.9], 0.5, True),
        ("voltage", [0.55, 0.5], [0.5, 0.1], math.nan, False),  # nothing is known of higher voltages
        ("rate_1_to_0", [0.1, 0.2], [0.5, 0.1], math.nan, False),  # at 0 there may be flips of the other kind
        ("rate_1_to_0", [0.1, 0.2], [0.9, 0.7], 0.15, False),
    ],
    ids=str,
)
def test_a_tolerable_ber_is_marked_where_it_is_a_bound_and_nan_where_nothing_is_known(
    axis, rates, means, tolerable, bound
):
    measured = curve(rates, means, axis=axis)
    assert measured.tolerable_ber(0.1) == pytest.approx(tolerable, abs=1e-9, nan_ok=True)
    assert measured.is_lower_bound(0.1) is bound


def test_a_clean_score_that_is_no_number_has_no_tolerable_ber():
    assert math.isnan(curve([0, 0.1], [0.9, 0.5], clean=math.nan).tolerable_ber())


def test_a_score_whose_lower_values_are_better_may_rise_by_the_drop():
    errors = BERCurve((0, 0.1, 0.2), [[2.0], [3.0], [5.0]], 2.0, score="loss", higher_is_better=False)
    assert errors.tolerable_ber(2) == pytest.approx(0.15)
    assert errors.tolerable_ber(1) == 0.1
    assert errors.tolerable_ber(7) == 0.2
    assert errors.is_lower_bound(7)
    with pytest.raises(ValueError, match="drop must be a number >= 0, got -1"):
        errors.tolerable_ber(-1)
    unknown = BERCurve((0, 0.1), [[2.0], [3.0]], 2.0, score="loss", higher_is_better=None)
    with pytest.raises(ValueError, match="is a higher loss better, or a lower one"):
        unknown.tolerable_ber()


@pytest.mark.parametrize("drop", [True, "0.1", None, math.inf, math.nan])
def test_a_drop_is_a_number(drop):
    with pytest.raises(ValueError, match=r"drop must be a fraction in \[0, 1\], got"):
        checked_drop(drop)


def test_the_mean_of_a_map_without_a_score_is_no_number():
    measured = BERCurve((0.1, 0.2), [[0.5, math.nan], [0.4, 0.6]], clean=0.9)
    assert math.isnan(measured.mean[0])
    assert all(map(math.isnan, measured.interval[0]))
    assert measured.mean[1] == 0.5


def test_rates_and_values_are_held_as_floats():
    measured = BERCurve((0, np.float32(0.5)), torch.ones(2, 1), clean=torch.tensor(1))
    assert [type(rate) for rate in measured.rates] == [float, float]
    assert (type(measured.clean), measured.values.dtype) == (float, torch.float64)
    assert measured.accuracy is measured.values


@pytest.mark.parametrize("values", [[0.5, 0.6], [[0.5]], [[], []]], ids=str)
def test_values_of_another_shape_are_refused(values):
    with pytest.raises(ValueError, match=r"values must have shape \(2 rates, maps\), got"):
        BERCurve((0, 0.1), values, clean=0.9)


def test_a_curve_of_another_score_has_no_accuracy():
    with pytest.raises(AttributeError, match="this curve shows loss and no accuracy: use its `values`"):
        _ = BERCurve((0,), [[1.0]], clean=1.0, score="loss").accuracy


def test_plot_says_which_score_it_shows_and_which_way_is_better():
    errors = BERCurve((0, 0.1), [[2.0, 4.0], [3.0, 5.0]], 2.0, score="squared_error", higher_is_better=False, name="a")
    _, axes = errors.plot()
    assert axes.get_ylabel() == "squared error, lower is better"
    assert axes.lines[0].get_ydata().tolist() == [3, 4]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a"]
    share = BERCurve((0, 0.1), [[0.2], [0.4]], 0.2, score="mean_iou", bounds=(0.0, 1.0)).plot()[1]
    assert share.get_ylabel() == "mean iou (%), higher is better"
    assert share.lines[0].get_ydata() == pytest.approx([20, 40])
    assert curve([0, 0.1], [0.9, 0.5]).plot()[1].get_ylabel() == "accuracy (%)"


def test_plot_draws_quantiles_where_they_are_asked_for():
    values = [[0.2, 0.5, 0.9], [0.1, 0.2, 0.3]]
    _, axes = BERCurve((0, 0.1), values, 0.9).plot(levels=(0, 1))
    corners = {(round(float(x), 6), round(float(y), 6)) for x, y in axes.collections[0].get_paths()[0].vertices}
    assert corners == {(0, 20), (0, 90), (10, 10), (10, 30)}
