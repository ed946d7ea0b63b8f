import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from bnnft.plots import plot_curve, plot_histogram, plot_sorted

RATES, MEAN = [0.0, 0.05, 0.2], [0.9, 0.8, 0.3]
INTERVAL = [(0.9, 0.9), (0.75, 0.85), (0.2, 0.4)]

PLOTS = {
    "curve": lambda ax: plot_curve(RATES, MEAN, INTERVAL, ax),
    "histogram": lambda ax: plot_histogram([1, 3, 0], [0.0, 1.0, 2.0, 3.0], "margin", {"mean": 1.25}, ax),
    "sorted": lambda ax: plot_sorted([1.0, 3.0, 2.0], "neuron", "importance", "title", ax),
}


@pytest.fixture(params=PLOTS)
def draw(request):
    return PLOTS[request.param]


def test_new_figures_are_labelled_and_unknown_to_pyplot(draw):
    figures = pyplot.get_fignums()
    figure, axes = draw(None)
    assert isinstance(figure, Figure)
    assert figure.axes == [axes]
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    assert pyplot.get_fignums() == figures


def test_given_axes_are_drawn_on(draw):
    figure = Figure()
    _, ax = figure.subplots(1, 2)
    assert draw(ax) == (figure, ax)
    assert ax.lines


def test_axes_of_a_subfigure_return_the_whole_figure(draw):
    figure = Figure()
    ax = figure.subfigures(1, 2)[0].add_subplot()
    assert draw(ax) == (figure, ax)


def test_curve_shows_rates_and_accuracies_in_percent_with_their_band():
    _, axes = plot_curve(RATES, MEAN, INTERVAL, label="plain")
    (line,) = axes.lines
    assert line.get_xdata() == pytest.approx([0, 5, 20])
    assert line.get_ydata() == pytest.approx([90, 80, 30])
    corners = {(round(float(x), 6), round(float(y), 6)) for x, y in axes.collections[0].get_paths()[0].vertices}
    assert corners == {(0, 90), (5, 75), (5, 85), (20, 20), (20, 40)}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["plain"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("bit error rate (%)", "accuracy (%)")
    assert axes.get_ylim() == (0, 100)


def test_a_score_that_is_no_fraction_is_drawn_as_it_is():
    _, axes = plot_curve(
        RATES, [200.0, 300.0, 400.0], [(190, 210), (250, 350), (300, 500)], score="loss", percent=False
    )
    assert axes.lines[0].get_ydata() == pytest.approx([200, 300, 400])
    assert axes.get_ylim()[1] > 500
    assert axes.get_ylabel() == "loss, higher is better"


def test_curve_over_another_parameter_keeps_its_values_and_name():
    _, axes = plot_curve([1.0, 2.0, 3.0], MEAN, INTERVAL, axis="voltage")
    assert axes.lines[0].get_xdata() == pytest.approx([1, 2, 3])
    assert axes.get_xlabel() == "supply voltage (V)"


def test_two_curves_fit_on_one_axes():
    _, axes = plot_curve(RATES, MEAN, INTERVAL, label="a")
    plot_curve(RATES, MEAN, INTERVAL, axes, label="b")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert len({line.get_color() for line in axes.lines}) == 2


def test_histogram_shows_shares_and_marks():
    _, axes = plot_histogram([1, 3, 0], [0.0, 1.0, 2.0, 3.0], "margin", {"mean": 1.25, "one flip": 2.0})
    values, edges, _ = axes.patches[0].get_data()
    assert values.tolist() == [0.25, 0.75, 0]
    assert edges.tolist() == [0, 1, 2, 3]
    assert [line.get_xdata() for line in axes.lines] == [[1.25, 1.25], [2.0, 2.0]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["mean 1.25", "one flip 2"]


def test_histogram_of_nothing_is_flat():
    _, axes = plot_histogram([0, 0], [0.0, 1.0, 2.0], "margin", {"mean": float("nan")})
    assert axes.patches[0].get_data()[0].tolist() == [0, 0]


@pytest.mark.filterwarnings("error")
def test_histogram_without_marks_has_no_legend():
    _, axes = plot_histogram([1, 3], [0.0, 1.0, 2.0], "margin", {})
    assert axes.get_legend() is None


def test_sorted_values_fall_and_their_mean_is_marked():
    _, axes = plot_sorted([1.0, 3.0, 2.0], "neuron", "importance", "title")
    values, mean = axes.lines
    assert list(values.get_xdata()) == [1, 2, 3]
    assert list(values.get_ydata()) == [3, 2, 1]
    assert mean.get_ydata() == [2, 2]
    assert axes.get_ylim()[0] == 0
    assert axes.get_title() == "title"
