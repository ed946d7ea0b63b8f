"""Figures of curves, histograms and importances: what ``plot()`` of the metrics and the report call."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Plot = tuple["Figure", "Axes"]


def axes(ax: "Axes | None" = None) -> Plot:
    """Return the figure and axes to draw on: the given ones, or new ones that no window system knows of."""
    if ax is not None:
        return ax.get_figure(root=True), ax  # type: ignore[return-value]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    return figure, figure.add_subplot()


def is_rate(axis: str) -> bool:
    """Return whether a parameter of an error model is a rate: a fraction, shown in percent."""
    return axis.startswith("rate")


def axis_name(axis: str) -> str:
    """Return how such a parameter is called in logs and in text: a rate alone is the BER."""
    return "ber" if axis == "rate" else axis


def axis_scale(axis: str) -> float:
    """Return what values of such a parameter are multiplied by in figures: rates are shown in percent."""
    return 100.0 if is_rate(axis) else 1.0


def axis_unit(axis: str) -> str:
    """Return the unit that such a parameter is shown in, nothing if it has none."""
    return "%" if is_rate(axis) else "V" if axis == "voltage" else ""


def axis_title(axis: str, name: str = "") -> str:
    """Return what the axis of a curve over such a parameter is called, or something else in its unit.

    Example:
        >>> axis_title("rate"), axis_title("rate_1_to_0"), axis_title("voltage"), axis_title("voltage", "tolerable")
        ('bit error rate (%)', 'rate 1 to 0 (%)', 'supply voltage (V)', 'tolerable (V)')
    """
    names = {"rate": "bit error rate", "voltage": "supply voltage"}
    name = name or names.get(axis, axis.replace("_", " "))
    return f"{name} ({axis_unit(axis)})" if axis_unit(axis) else name


def axis_value(axis: str, value: float) -> str:
    """Return a value of such a parameter for people.

    Example:
        >>> axis_value("rate", 0.05), axis_value("voltage", 0.55), axis_value("scale", 2)
        ('5 %', '0.55 V', '2')
    """
    return axis_values(axis, [value])[0]


def axis_values(axis: str, values: Sequence[float]) -> list[str]:
    """Return values of such a parameter for people, with as many digits as tell them apart."""
    shown = distinct_numbers([axis_scale(axis) * value for value in values])
    return [f"{number} {axis_unit(axis)}".strip() for number in shown]


def distinct_numbers(values: Sequence[float]) -> list[str]:
    """Return numbers as texts of at least six digits, and of as many as tell different numbers apart.

    Example:
        >>> distinct_numbers([0, 0.05]), distinct_numbers([0.1, 0.1000001])
        (['0', '0.05'], ['0.1', '0.1000001'])
    """
    texts: list[str] = []
    for digits in range(6, 18):  # 17 digits tell any two floats apart
        texts = [f"{value:.{digits}g}" for value in values]
        if len(set(texts)) == len(set(values)):
            break
    return texts


def score_title(score: str, higher_is_better: bool | None = True, percent: bool = True) -> str:
    """Return what the axis of a score is called.

    Example:
        >>> score_title("accuracy"), score_title("mean_squared_error", higher_is_better=False, percent=False)
        ('accuracy (%)', 'mean squared error, lower is better')
    """
    title = f"{score.replace('_', ' ')} (%)" if percent else score.replace("_", " ")
    if score == "accuracy" or higher_is_better is None:
        return title
    return f"{title}, {'higher' if higher_is_better else 'lower'} is better"


def plot_curve(
    rates: Sequence[float],
    mean: Sequence[float],
    interval: Sequence[tuple[float, float]],
    ax: "Axes | None" = None,
    label: str | None = None,
    axis: str = "rate",
    score: str = "accuracy",
    higher_is_better: bool | None = True,
    percent: bool = True,
) -> Plot:
    """Draw a score over bit error rate with its band.

    Args:
        rates: fractions, shown in percent, or values of another parameter.
        mean: the score at each rate.
        interval: ends of the band at each rate.
        ax: the axes to draw on; new ones if ``None``.
        label: for the legend.
        axis: the parameter that the rates are of.
        score: name of the score.
        higher_is_better: of the score.
        percent: the score is a fraction, shown in percent.
    """
    figure, ax = axes(ax)
    x, scale = [axis_scale(axis) * rate for rate in rates], 100 if percent else 1
    label = None if label is None else label.replace("$", r"\$")  # no formula
    (line,) = ax.plot(x, [scale * value for value in mean], marker="o", markersize=4, label=label)
    low, high = zip(*((scale * a, scale * b) for a, b in interval), strict=True)
    ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.set_xlabel(axis_title(axis))
    ax.set_ylabel(score_title(score, higher_is_better, percent))
    if percent:
        ax.set_ylim(0, 100)
    if is_rate(axis):
        ax.set_xlim(left=min(0, ax.get_xlim()[0]) if len(x) > 1 else 0)
    ax.grid(alpha=0.3)
    if label is not None:
        ax.legend(title=None, frameon=False)
    return figure, ax


def plot_histogram(
    counts: Sequence[float], edges: Sequence[float], xlabel: str, marks: dict[str, float], ax: "Axes | None" = None
) -> Plot:
    """Draw the share of values in each bin, with vertical lines at the named marks."""
    figure, ax = axes(ax)
    total = sum(counts) or 1
    ax.stairs([count / total for count in counts], edges, fill=True, alpha=0.6)
    marks = {name: value for name, value in marks.items() if math.isfinite(value)}
    for number, (name, value) in enumerate(marks.items()):
        ax.axvline(value, color=f"C{number + 1}", linestyle="--", label=f"{name} {value:.3g}")
    ax.set_xlabel(xlabel)
    ax.set_ylabel("share of values")
    ax.set_ylim(bottom=0)
    if marks:
        ax.legend(frameon=False)
    return figure, ax


def plot_sorted(values: Sequence[float], xlabel: str, ylabel: str, title: str, ax: "Axes | None" = None) -> Plot:
    """Draw values from the largest to the smallest, with their mean."""
    figure, ax = axes(ax)
    ordered = sorted(values, reverse=True)
    ax.plot(range(1, len(ordered) + 1), ordered)
    ax.axhline(sum(ordered) / max(len(ordered), 1), color="C1", linestyle="--", label="mean")
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.set_title(title)
    ax.locator_params(axis="x", integer=True)
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return figure, ax
