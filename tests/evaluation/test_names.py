from itertools import product

import pytest

from bnnft.evaluation.names import CurveNames


def everything(names, rates=(0, 0.1)):
    return [*names.points(rates), names.over, names.tolerable, names.faulty, names.table, names.figure, names.file]


def test_names_of_accuracy_over_the_bit_error_rate():
    """What dashboards and configs of users hold; they never change."""
    assert everything(CurveNames(), (0, 0.01, 0.3)) == [
        "acc_ber_0",
        "acc_ber_0p01",
        "acc_ber_0p3",
        "acc_over_ber",
        "tolerable_ber",
        "acc_faulty",
        "ber_table",
        "ber_figure",
        "accuracy_over_ber",
    ]
    assert CurveNames(axis="voltage").points([0.55]) == ["acc_voltage_0p55"]


@pytest.mark.parametrize(
    "rates",
    [
        [0.1, 0.1000001],
        [0.1, 0.1 + 1e-15, 0.1 + 2e-15],
        [1e-7, 2e-7, 1.0000001e-7],
        [0, 5e-324],
        [1 / 3, 1 / 3 + 6e-17],
    ],
    ids=str,
)
def test_rates_that_differ_have_names_that_differ(rates):
    assert len(set(rates)) == len(rates)
    assert len(set(CurveNames().points(rates))) == len(rates)


def test_rounding_of_a_rate_does_not_show():
    assert CurveNames().points([0.1 * 3, 0.7]) == ["acc_ber_0p3", "acc_ber_0p7"]
    assert CurveNames().points([1 / 3]) == ["acc_ber_0p333333"]


def test_no_two_curves_share_a_name():
    """Nor any part of them: scores, axes and names of each kind with each other."""
    kinds = [CurveNames("accuracy", "rate", name) for name in ("", "a", "b")]
    kinds += [CurveNames("mean_iou", axis, "iou") for axis in ("rate", "voltage")]
    for one, other in product(kinds[:4], kinds[:4]):
        assert one == other or not set(everything(one)) & set(everything(other))
    assert CurveNames("mean_iou").over == "mean_iou_over_ber"
    assert all("." not in name and "=" not in name for kind in kinds for name in everything(kind, (0.5, 1e-5)))
