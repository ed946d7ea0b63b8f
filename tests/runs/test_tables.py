from result_folders import begin, fail, finish

from bnnft.runs.results import read_jobs
from bnnft.runs.tables import job_table, layer_metrics, run_tables


def test_layers_come_from_the_names():
    values = {"test/margin/fc1": 12.5, "test/importance_cv/fc1": 0.3, "val/margin/fc1": 1.0, "test/other/fc1": 2.0}
    assert layer_metrics(values) == {"fc1": {"margin": 12.5, "importance_cv": 0.3}}


def test_tables_of_a_run_show_curve_and_layers(tmp_path):
    accuracy, neurons = run_tables(finish(tmp_path, 0.1, 0))
    assert accuracy.title == "clean accuracy 80.0 %, tolerable BER 11.0 %"
    assert list(accuracy.columns[0].cells)[:3] == ["0", "3", "6"]
    assert list(neurons.columns[0].cells) == ["fc1", "fc2"]


def test_the_table_of_a_sweep_shows_every_job(tmp_path):
    finish(tmp_path, 0.1, 0)
    begin(tmp_path, 0.1, 1)
    fail(tmp_path, 0.1, 2)
    columns = {column.header: list(column.cells) for column in job_table(read_jobs([tmp_path])[0]).columns}
    assert columns["job"] == ["seed=0", "seed=1", "seed=2"]
    assert columns["state"] == ["finished", "unfinished", "failed"]
    assert columns["clean (%)"] == ["80.0", "", ""]
    assert columns["time"] == ["1:06 min", "", ""]
    assert columns["error"] == ["", "", "ValueError: the reason"]
