import io
import json

import pytest
from result_folders import begin, fail, finish, finish_with
from rich.console import Console

from bnnft import BERCurve
from bnnft.runs.job import fail_job, read_jobs
from bnnft.runs.tables import duration, job_table, layer_metrics, run_tables


def test_layers_come_from_the_names():
    values = {"test/margin/fc1": 12.5, "test/importance_cv/fc1": 0.3, "val/margin/fc1": 1.0, "test/other/fc1": 2.0}
    assert layer_metrics(values) == {"fc1": {"margin": 12.5, "importance_cv": 0.3}}


def test_metrics_of_several_callbacks_are_shown_under_their_names(tmp_path):
    measured = {"test/mine_class_margin/fc1": 2.0, "test/margin/fc1": 3.0, "test/mine_margin/fc1": 4.0}
    (table,) = run_tables(finish_with(tmp_path, 0.1, 0, [], measured))
    assert [(column.header, *column.cells) for column in table.columns] == [
        ("layer", "fc1"),
        ("margin", "3"),
        ("mine class margin", "2"),
        ("mine margin", "4"),
    ]


def test_tables_of_a_run_show_curve_and_layers(tmp_path):
    accuracy, neurons = run_tables(finish(tmp_path, 0.1, 0))
    assert accuracy.title == "clean accuracy 80.0 %, tolerable BER 11.0 %"
    assert list(accuracy.columns[0].cells)[:3] == ["0", "3", "6"]
    assert list(neurons.columns[0].cells) == ["fc1", "fc2"]


def test_the_table_of_a_sweep_shows_every_job(tmp_path):
    finish(tmp_path, 0.1, 0)
    begin(tmp_path, 0.1, 1)
    fail(tmp_path, 0.1, 2)
    columns = {column.header: [*map(str, column.cells)] for column in job_table(read_jobs([tmp_path])[0]).columns}
    assert columns["job"] == ["seed=0", "seed=1", "seed=2"]
    assert columns["state"] == ["finished", "unfinished", "failed"]
    assert columns["clean (%)"] == ["80.0", "", ""]
    assert columns["time"] == ["1:06 min", "", ""]
    assert columns["error"] == ["", "", "ValueError: the reason"]


def test_each_curve_of_a_run_has_a_table(tmp_path):
    chip = BERCurve((0.1, 0.1000001), [[0.5, 0.6], [0.4, 0.5]], 0.9, name="chip")
    loss = BERCurve((1, 2), [[2.0, 2.0], [3.0, 4.0]], 1.5, "scale", "squared_error", False)
    measured = {
        "test/chip_tolerable_ber": 0.05,
        "test/tolerable_scale": 2.0,
        "test/tolerable_scale_is_lower_bound": 1.0,
    }
    first, second = run_tables(finish_with(tmp_path, 0.0, 0, [chip, loss], measured))
    assert first.title == "chip: clean accuracy 90.0 %, tolerable BER 5.0 %"
    assert list(first.columns[0].cells) == ["10", "10.00001"]
    assert second.title == "clean squared error 1.5, tolerable scale ≥ 2"
    assert [column.header for column in second.columns][:2] == ["scale", "squared error, lower is better"]
    assert list(second.columns[1].cells) == ["2", "3.5"]


def test_a_sweep_whose_first_job_has_no_curve_is_shown_by_the_others(tmp_path):
    begin(tmp_path, 0.1, 0)
    finish_with(tmp_path, 0.1, 1, [], {"test/acc": 0.75})
    finish(tmp_path, 0.1, 2, axis="voltage")
    columns = {column.header: [*map(str, column.cells)] for column in job_table(read_jobs([tmp_path])[0]).columns}
    assert columns["state"] == ["unfinished", "finished", "finished"]
    assert columns["clean (%)"] == ["", "75.0", "80.0"]
    assert columns["tolerable voltage (V)"] == ["", "", "0.89"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1:00 min"), (61, "1:01 min"), (3599, "59:59 min"), (3600, "1:00 h")],
)
def test_times_are_shown_for_people(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("text", ["callbacks=[default,early_stopping]", "+note=[/x]", "+note=[red]a[/red]", "a\\[b"])
def test_no_text_of_a_run_is_markup(tmp_path, text):
    """Rich would take what is in brackets for a style, or fail."""
    job, _ = begin(tmp_path, 0.1, 0)
    (job / ".hydra" / "overrides.yaml").write_text(json.dumps([text]))
    fail_job(job, ValueError(text))
    begin(tmp_path, 0.1, 1)
    console = Console(width=200, file=io.StringIO())
    console.print(job_table(read_jobs([tmp_path])[0]))
    assert console.file.getvalue().count(text) == 2
