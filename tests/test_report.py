import json

import pytest
import torch

from bnnft import BERCurve
from bnnft.report import labels, layer_metrics, main, read_result, read_sweep, run_tables, write_result

METRICS = {"test/acc": 0.9, "test/tolerable_ber": 0.05, "test/margin/fc1": 12.5, "test/importance_cv/fc1": 0.3}


def curve(shift=0.0):
    return BERCurve((0.0, 0.1), torch.tensor([[0.9, 0.9], [0.7, 0.8]], dtype=torch.float64) - shift, clean=0.9 - shift)


def sweep(folder):
    for rate in (0.0, 0.1):
        job = folder / f"ber.rate={rate}"
        (job / ".hydra").mkdir(parents=True)
        (job / ".hydra" / "overrides.yaml").write_text(f"- ber.rate={rate}\n- dataset=digits\n")
        write_result(job, METRICS, curve(rate), {"seed": 0})
    return folder


def test_what_is_written_is_read(tmp_path):
    write_result(tmp_path, METRICS, curve(), {"seed": 3})
    result = read_result(tmp_path)
    assert result.metrics == METRICS
    assert torch.equal(result.curve.accuracy, curve().accuracy)
    assert (result.curve.rates, result.curve.clean, result.curve.axis) == ((0.0, 0.1), 0.9, "rate")
    assert json.loads((tmp_path / "metrics.json").read_text())["config"] == {"seed": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_runs_are_named_by_what_differs(tmp_path):
    assert labels(read_sweep(sweep(tmp_path))) == ["ber.rate=0.0", "ber.rate=0.1"]


def test_layers_come_from_the_names(tmp_path):
    assert layer_metrics({**METRICS, "val/margin/fc1": 1.0, "test/other/fc1": 2.0}) == {
        "fc1": {"margin": 12.5, "importance_cv": 0.3}
    }


def test_tables_of_a_run_show_curve_and_layers(tmp_path):
    accuracy, neurons = run_tables(write_result(tmp_path, METRICS, curve(), None))
    assert accuracy.title == "clean accuracy 90.0 %, tolerable BER 5.0 %"
    assert list(accuracy.columns[1].cells) == ["90.0", "75.0"]
    assert list(neurons.columns[0].cells) == ["fc1"]


def test_the_command_writes_tables_and_figure(tmp_path, capsys):
    assert main([str(sweep(tmp_path))]) == 0
    assert "ber.rate=0.1" in capsys.readouterr().out
    page = (tmp_path / "report.md").read_text()
    assert "| ber.rate=0.0 | 90.0 | 90.0 | 75.0 | 5.0 |" in page
    assert "| ber.rate=0.1 | 12.5 | 0.3 |" in page
    assert (tmp_path / "results.csv").read_text().startswith("run,clean,0 %,10 %,tolerable BER,margin fc1")
    assert (tmp_path / "accuracy_over_ber.svg").stat().st_size > 5000


@pytest.mark.parametrize("folder", ["missing", "."])
def test_a_folder_without_results_is_named(tmp_path, capsys, folder):
    assert main([str(tmp_path / folder)]) == 2
    assert f"no metrics.json below {str(tmp_path / folder)!r}" in capsys.readouterr().err
