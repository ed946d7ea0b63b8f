import csv
import json
import re
import subprocess
import sys
import time

import pytest
from result_folders import begin, fail, finish, finish_with, sweep

from bnnft import BERCurve
from bnnft.report.__main__ import main


def test_the_command_writes_tables_figures_and_page(tmp_path, capsys):
    assert main([str(sweep(tmp_path))]) == 0
    said = capsys.readouterr().out
    names = {"results.csv", "report.md", "report.html"} | {f"accuracy_over_ber.{s}" for s in ("svg", "pdf", "png")}
    assert names <= {path.name for path in tmp_path.iterdir()}
    assert "12 jobs" in said
    assert all(str(tmp_path / name) in said for name in names)
    page = (tmp_path / "report.md").read_text()
    assert "| ber.rate=0.1, seed=2 | 80.0 |" in page
    assert (tmp_path / "accuracy_over_ber.pdf").read_bytes().startswith(b"%PDF")


def test_a_row_for_each_run_and_rate(tmp_path):
    """Tidy: the numbers are those of the results, with the settings beside them."""
    main([str(sweep(tmp_path))])
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert len(rows) == 12 * 10
    row = next(row for row in rows if row["run"] == "ber.rate=0.1, seed=1" and row["rate"] == "0.09")
    result = finish(tmp_path / "again", 0.1, 1)
    assert (row["ber.rate"], row["seed"], row["state"], row["maps"]) == ("0.1", "1", "finished", "5")
    assert float(row["accuracy"]) == result.curve.mean[3]
    assert (float(row["low"]), float(row["high"])) == result.curve.interval[3]
    assert float(row["test/margin/fc1"]) == result.metrics["test/margin/fc1"]


def test_a_half_finished_sweep_says_what_is_missing(tmp_path):
    finish(tmp_path, 0.1, 0)
    begin(tmp_path, 0.1, 1)
    fail(tmp_path, 0.1, 2)
    broken = begin(tmp_path, 0.1, 3)[0] / "metrics.json"
    broken.write_text('{"metrics": {"test/acc"')
    assert main([str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text()
    missing = page[page.index("Missing:") :]
    assert "seed=1,dataset=digits: unfinished" in missing
    assert "seed=2,dataset=digits: failed ValueError: the reason" in missing
    assert f"{broken} is no result of a run, or was cut" in missing


def test_curves_over_a_voltage_are_shown_as_such_and_others_named_beside_them(tmp_path):
    for seed in (0, 1):
        finish(tmp_path, 0.0, seed, rates=3, axis="voltage")
    finish(tmp_path, 0.2, 2, rates=3)
    assert main([str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text()
    assert "| run | clean | 0.94 V | 0.97 V | 1 V | tolerable voltage |" in page
    assert "| ber.rate=0.0, seed=0 | 90.0 | " in page
    assert page.count("| 0.99 |") == 2
    assert "| ber.rate=0.2, seed=2 | 70.0 |  |  |  |  |" in page
    assert "seed=2: its curve is over rate, not voltage; a report of its own shows it" in page
    html = (tmp_path / "report.html").read_text().split('id="data"')[1]
    data = json.loads(html[html.index(">") + 1 : html.index("</script>")])
    assert (data["axis"], data["tolerable"]) == ("supply voltage (V)", "tolerable voltage (V)")
    assert data["at"] == ["0.94 V", "0.97 V", "1 V"]
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert {row["voltage"] for row in rows} == {"1.0", "0.97", "0.94", ""}
    assert {row["rate"] for row in rows} == {"0.0", "0.03", "0.06", ""}


@pytest.mark.parametrize("folder", ["missing", "."])
def test_a_folder_without_results_is_named(tmp_path, capsys, folder):
    assert main([str(tmp_path / folder)]) == 2
    assert f"no metrics.json below {str(tmp_path / folder)!r}" in capsys.readouterr().err


def test_a_sweep_of_failures_has_no_report(tmp_path, capsys):
    fail(tmp_path, 0.1, 0)
    assert main([str(tmp_path)]) == 2
    assert "none of 1 runs is finished" in capsys.readouterr().err


def test_an_unknown_key_is_named_with_those_there_are(tmp_path, capsys):
    assert main([str(sweep(tmp_path)), "--group-by", "los"]) == 2
    assert "got 'los'; there are ber.rate, seed" in capsys.readouterr().err


def test_several_sweeps_share_one_figure(tmp_path):
    sweep(tmp_path / "a", rates=(0.1,), loss="hinge")
    sweep(tmp_path / "b", rates=(0.1,), loss="margin")
    out = tmp_path / "out"
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main([*folders, "--group-by", "loss", "--out", str(out)]) == 0
    figure = (out / "accuracy_over_ber.svg").read_text()
    assert "loss=hinge" in figure
    assert "loss=margin" in figure


def test_a_thousand_runs_are_read_in_a_gigabyte(tmp_path):
    """And in half a minute on a machine that does nothing else: the bound here is for a slow one."""
    sweep(tmp_path, rates=[round(0.001 * n, 3) for n in range(100)], seeds=range(10))
    # the peak of this process alone: what the system counts for a child can be that of its parent
    code = "import sys; from bnnft.report.__main__ import main; main(sys.argv[1:])"
    code += "; print(open('/proc/self/status').read())"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert time.monotonic() - start < 120
    peak = next(line for line in done.stdout.splitlines() if line.startswith("VmHWM"))
    assert int(peak.split()[1]) < 2**20  # kB


def test_a_sweep_whose_first_jobs_have_no_curve_has_the_report_of_the_others(tmp_path):
    """One was cut, one failed, one has no curve; the fourth says what is shown."""
    begin(tmp_path, 0.0, 0)
    fail(tmp_path, 0.0, 1)
    finish_with(tmp_path, 0.0, 2, [], {"test/acc": 0.75})
    finish(tmp_path, 0.1, 0, axis="voltage", rates=2)
    assert main([str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text()
    assert "| run | clean | 0.97 V | 1 V | tolerable voltage |" in page
    assert "| ber.rate=0.0, seed=2 | 75.0 |  |  |  |" in page
    assert "seed=0,dataset=digits: unfinished" in page
    assert "ber.rate=0.1" in (tmp_path / "accuracy_over_ber.svg").read_text()


def test_a_sweep_without_any_curve_has_a_report(tmp_path):
    finish_with(tmp_path, 0.0, 0, [], {"test/acc": 0.75})
    assert main([str(tmp_path)]) == 0
    assert "| 75.0 |" in (tmp_path / "report.md").read_text()


def test_all_curves_of_runs_reach_tables_figures_and_page_under_their_names(tmp_path):
    for seed in (0, 1):
        chip = BERCurve((0.1, 0.2), [[0.5, 0.6 + 0.1 * seed], [0.4, 0.5]], 0.9, name="chip")
        loss = BERCurve((0.1,), [[2.0, 3.0 + seed]], 1.5, score="squared_error", higher_is_better=False, name="mse")
        usual = BERCurve((0, 0.1), [[0.9, 0.9], [0.7, 0.8]], 0.9)
        finish_with(tmp_path, 0.1, seed, [usual, chip, loss], {"test/chip_tolerable_ber": 0.05})
    assert main([str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text()
    sections = {part.splitlines()[0]: part for part in page.split("## ")[1:]}
    assert list(sections) == ["acc_over_ber", "chip", "mse"]
    assert "| run | clean | 10 % | 20 % | tolerable BER |" in sections["chip"]
    assert "| seed=1 | 90.0 | 60.0 | 45.0 | 5.0 |" in sections["chip"]
    assert "Squared error, lower is better." in sections["mse"]
    assert "| seed=1 | 1.5 | 3 |  |" in sections["mse"]
    for figure in ("accuracy_over_ber", "chip_acc_over_ber", "mse_squared_error_over_ber"):
        assert f"({figure}.svg)" in page
        assert {path.suffix for path in tmp_path.glob(f"{figure}.*")} == {".svg", ".pdf", ".png"}
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    found = [(row["curve"], row["rate"], row["accuracy"], row["squared_error"]) for row in rows if row["seed"] == "0"]
    assert found == [
        ("acc_over_ber", "0.0", "0.9", ""),
        ("acc_over_ber", "0.1", "0.75", ""),
        ("chip_acc_over_ber", "0.1", "0.55", ""),
        ("chip_acc_over_ber", "0.2", "0.45", ""),
        ("mse_squared_error_over_ber", "0.1", "", "2.5"),
    ]


STRANGE = ["{{data}}", "<!--<script>", "</script><b>x", "a$\\frac{$b", "x|y", "[a](b)", "*z*"]


def test_no_text_of_a_run_is_markup_in_page_tables_and_figures(tmp_path):
    """Also in the name of the sweep, which is the title."""
    folder = tmp_path / "{{data}}"
    for seed, text in enumerate(STRANGE):
        finish(folder, 0.1, seed, loss=f"cross_entropy{text}".replace("/", "-"))
    assert main([str(folder), "--group-by", "loss._target_"]) == 0
    page = (folder / "report.html").read_text()
    data = page.split('<script id="data" type="application/json">')[1].split("</script>")[0]
    assert "<" not in data
    assert {job["state"] for job in json.loads(data)["jobs"]} == {"finished"}
    assert "<title>{{data}}</title>" in page
    for block in (folder / "report.md").read_text().split("\n\n"):
        if block.startswith("| "):  # each row has the cells of its header
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    assert (folder / "accuracy_over_ber.pdf").stat().st_size > 1000


def test_a_folder_of_results_runs_nothing_that_it_names(tmp_path, monkeypatch):
    """Neither what its config would build, nor what its texts would be as code, nor a file beside it."""
    (tmp_path / "hostile.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef content(*_): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    finish(tmp_path / "runs", 0.1, 0)
    (place,) = (tmp_path / "runs").rglob("metrics.json")
    result = json.loads(place.read_text())
    target = {"_target_": "hostile.content"}
    result["config"] |= {"dataset": target, "loss": target, "name": "${oc.env:HOME}", "data_dir": str(tmp_path)}
    place.write_text(json.dumps(result))
    shell, code = "!!python/object/apply:os.system ['touch ran']", "__import__('hostile')"
    (place.parent / ".hydra" / "overrides.yaml").write_text(
        f"- ber.rate=0.1\n- {json.dumps(code)}\n- {json.dumps(shell)}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main([str(tmp_path / "runs")]) == 0
    (place.parent / ".hydra" / "overrides.yaml").write_text(f"- {shell}\n")
    assert main([str(tmp_path / "runs")]) == 0
    assert not (tmp_path / "ran").exists()
    assert "hostile" not in sys.modules
