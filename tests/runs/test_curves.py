import math

import pytest
from result_folders import begin, finish, finish_with

from bnnft import BERCurve
from bnnft.evaluation.names import CurveNames
from bnnft.runs.curves import CurveKind, curve_kinds, kind_of, left_out, percent
from bnnft.runs.job import read_jobs

LOSS = BERCurve((0, 0.1), [[2.0], [3.0]], 2.0, score="loss", higher_is_better=False, name="mine")


def test_kinds_of_curves_are_those_of_all_runs_by_key(tmp_path):
    begin(tmp_path, 0.0, 0)  # nothing of it is there yet
    finish(tmp_path, 0.1, 1)
    finish_with(tmp_path, 0.1, 2, [LOSS])
    kinds = curve_kinds(read_jobs([tmp_path])[0])
    assert [(kind.key, kind.names.over, kind.percent, kind.higher_is_better) for kind in kinds] == [
        ("", "acc_over_ber", True, True),
        ("mine", "mine_loss_over_ber", False, False),
    ]
    assert curve_kinds([]) == [CurveKind()]


def test_a_curve_of_another_axis_or_score_is_named_beside_its_kind(tmp_path):
    finish(tmp_path, 0.0, 0)
    finish(tmp_path, 0.1, 1, axis="voltage")
    finish_with(tmp_path, 0.2, 2, [BERCurve((0,), [[2.0]], 2.0, score="loss")])
    jobs, _ = read_jobs([tmp_path])
    (kind,) = curve_kinds(jobs)
    assert [kind.of(job.result) is not None for job in jobs] == [True, False, False]
    assert left_out(jobs, ["a", "b", "c"]) == [
        "b: its curve is over voltage, not rate; a report of its own shows it",
        "c: its curve shows loss, not accuracy; a report of its own shows it",
    ]


@pytest.mark.parametrize(
    ("axis", "rates", "marked", "text"),
    [
        ("rate", (0.0, 0.3), 0.0, "12.3"),
        ("rate", (0.0, 0.3), 1.0, "≥ 12.3"),
        ("voltage", (0.55, 0.5), 1.0, "≤ 0.123"),
        ("voltage", (0.55, 0.5), 0.0, "0.123"),
    ],
)
def test_a_tolerable_value_that_is_a_bound_is_marked_as_one(tmp_path, axis, rates, marked, text):
    curve = BERCurve(rates, [[0.9], [0.9]], 0.9, axis)
    name = f"test/{curve.names.tolerable}"
    result = finish_with(tmp_path, 0.0, 0, [curve], {name: 0.1234, f"{name}_is_lower_bound": marked})
    assert kind_of("", curve).tolerable_text(result) == text


def test_what_is_not_known_is_nothing(tmp_path):
    curve = BERCurve((0, 0.1), [[math.nan], [0.5]], math.nan)
    result = finish_with(tmp_path, 0.0, 0, [curve], {"test/tolerable_ber": math.nan})
    kind = kind_of("", curve)
    assert (kind.tolerable_text(result), kind.score(kind.clean(result)), kind.bound(result)) == ("", "", "")
    other = finish_with(tmp_path, 0.0, 1, [], {"test/acc": 0.8})
    assert (kind.clean(other), kind.of(other), kind.tolerable_text(other)) == (0.8, None, "")
    assert math.isnan(kind_of("mine", LOSS).clean(other))  # its accuracy is no loss


def test_scores_are_shown_in_percent_where_they_are_fractions():
    assert (CurveKind().score(0.1234), kind_of("", LOSS).score(0.12345)) == ("12.3", "0.1235")
    assert (percent(0.5), percent(math.nan), kind_of("", LOSS).score(math.nan)) == ("50.0", "", "")
    assert kind_of("", LOSS).score_title == "loss, lower is better"
    assert CurveKind(names=CurveNames(axis="rate_1_to_0")).tolerable_title == "tolerable rate 1 to 0 (%)"
