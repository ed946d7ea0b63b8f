"""Several processes: single runs in one second, and one sweep together."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from commands import prepared, run
from result_folders import begin

from bnnft.runs import claim as claims
from bnnft.runs import sharing
from bnnft.runs.claim import claim, owner_of
from bnnft.runs.sharing import free_folder, wait

FAST = ["verbose=true", "trainer.max_epochs=1", "model.widths=[32,16]", "callbacks=latent_clamp", "logger=none"]
FAST += ["optimized_metric=test/acc", "threads=1"]
EIGHT = ["-m", *FAST, "name=eight", "ber.rate=0,0.2", "seed=0,1,2,3"]


def together(folder, *commands):
    """Start commands at once; returns what each said, after all have ended well."""
    environment = prepared(folder)
    processes = [
        subprocess.Popen(
            [sys.executable, "train.py", *command],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(commands), said[0][-3000:]
    return said


def results(folder):
    found = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/metrics.json")}
    return {name: result["metrics"] for name, result in found.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    done = run(folder, *EIGHT)
    assert done.returncode == 0, done.stderr[-3000:]
    return results(folder / "multirun" / "eight")


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_a_sweep_and_each_job_is_done_once(alone, tmp_path, processes):
    said = together(tmp_path, *[EIGHT] * processes)
    assert sum(text.count("`Trainer.fit` stopped") for text in said) == 8
    assert all(text[text.rindex("8 jobs") :].count("finished") == 8 for text in said)
    assert results(tmp_path / "multirun" / "eight") == alone


def test_runs_that_start_in_one_second_have_folders_of_their_own(tmp_path):
    said = together(tmp_path, *([*FAST, "hydra.run.dir=outputs/now", f"ber.rate={rate}"] for rate in (0, 0.3)))
    found = [path.parent for path in (tmp_path / "outputs").glob("*/metrics.json")]
    assert {path.name for path in found} == {"now", "now_1"}
    assert {json.loads((path / "metrics.json").read_text())["config"]["ber"]["rate"] for path in found} == {0, 0.3}
    assert {text.split("results and figures: ")[1].splitlines()[0] for text in said} == set(map(str, found))


def test_a_single_run_goes_on_in_the_folder_of_the_same_settings_alone(tmp_path):
    job, _ = begin(tmp_path, 0.1, 0)
    own = ["ber.rate=0.1", "seed=0", "dataset=digits"]
    other = [*own[:-1], "dataset=mine"]
    taken = [free_folder(job, settings) for settings in (own, other)]
    assert [path.name for path in taken] == [job.name, f"{job.name}_1"]
    for path in taken:
        claim(path).release()


def test_a_folder_is_waited_for_and_its_owner_named(tmp_path, monkeypatch, capsys):
    """And had as soon as the owner is dead."""
    place = tmp_path / ".claim"
    place.mkdir()
    alive = replace(claims._this(), pid=1, start=claims._start(1))
    (place / "1").write_text(json.dumps(vars(alive)))
    assert owner_of(tmp_path) == alive
    dead = json.dumps(vars(alive) | {"start": "earlier"})
    monkeypatch.setattr(sharing.time, "sleep", lambda _: (place / "1").write_text(dead))
    wait(tmp_path)
    claim(tmp_path).release()
    assert capsys.readouterr().out == f"{tmp_path} is run by {alive}: waits for it\n"
