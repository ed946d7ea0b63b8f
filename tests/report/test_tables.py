from result_folders import begin, finish, finish_with

from bnnft import BERCurve
from bnnft.report.tables import markdown, neuron_rows, score_rows
from bnnft.runs.curves import CurveKind, curve_kinds, kind_of
from bnnft.runs.job import read_jobs


def test_a_row_for_each_finished_run_with_the_score_at_each_rate(tmp_path):
    begin(tmp_path, 0.1, 0)
    result = finish(tmp_path, 0.1, 1, rates=2)
    finish(tmp_path, 0.1, 2, rates=3)
    finish_with(tmp_path, 0.1, 3, [], {"test/acc": 0.75})
    header, rows = score_rows(read_jobs([tmp_path])[0], CurveKind())
    assert header == ["run", "clean", "0 %", "3 %", "6 %", "tolerable BER"]
    means = [f"{100 * mean:.1f}" for mean in result.curve.mean]
    assert rows[0] == ["seed=1", "80.0", *means, "", "11.0"]
    assert rows[2] == ["seed=3", "75.0", "", "", "", ""]
    assert len(rows) == 3


def test_rates_that_differ_have_columns_that_differ(tmp_path):
    curve = BERCurve((0.1, 0.1000001), [[0.5], [0.4]], 0.9)
    finish_with(tmp_path, 0.1, 0, [curve])
    header, rows = score_rows(read_jobs([tmp_path])[0], kind_of("", curve))
    assert header[2:4] == ["10 %", "10.00001 %"]
    assert rows[0][2:4] == ["50.0", "40.0"]


def test_another_score_is_shown_as_it_is(tmp_path):
    loss = BERCurve((1, 2), [[2.0, 2.0], [3.0, 4.0]], 1.5, "scale", "loss", False)
    finish_with(tmp_path, 0.1, 0, [loss], {"test/tolerable_scale": 1.25})
    jobs, _ = read_jobs([tmp_path])
    assert score_rows(jobs, *curve_kinds(jobs)) == (
        ["run", "clean", "1", "2", "tolerable scale"],
        [[jobs[0].folder.name, "1.5", "2", "3.5", "1.25"]],
    )


def test_neurons_that_were_not_measured_are_left_blank(tmp_path):
    finish(tmp_path, 0.1, 0)
    finish_with(tmp_path, 0.1, 1, [], {"test/margin/fc1": 2.0})
    header, rows = neuron_rows(read_jobs([tmp_path])[0])
    assert header == ["run", "margin fc1", "margin fc2", "importance CV fc1"]
    assert rows[1] == ["seed=1", "2", "", ""]
    finish_with(tmp_path, 0.1, 2, [], {"test/mine_margin/fc1": 5.0, "test/mine_class_margin/fc1": 6.0})
    header, rows = neuron_rows(read_jobs([tmp_path])[0])
    assert header == ["run", "margin fc1", "margin fc2", "mine margin fc1", "importance CV fc1"]
    assert rows[2] == ["seed=2", "", "", "5", ""]


def test_markdown_has_a_line_below_the_header():
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
