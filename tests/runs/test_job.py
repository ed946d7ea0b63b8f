import errno
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from result_folders import begin, config, fail, finish, sweep

from bnnft.runs import claim as claims
from bnnft.runs.claim import claim
from bnnft.runs.job import begin_job, fail_job, labels, last_checkpoint, read_job, read_jobs, running, whole_checkpoint
from bnnft.runs.results import write_result
from bnnft.runs.stopping import StoppedError


@pytest.fixture(autouse=True)
def said_at_exit(monkeypatch):
    """Nothing at the end of the tests."""
    monkeypatch.setattr("bnnft.runs.job.atexit.register", lambda said: None)


def test_a_result_is_found_again_for_its_config_alone(tmp_path):
    finish(tmp_path, 0.1, 0)
    (job,) = tmp_path.iterdir()
    assert begin_job(job, config(0.1, 0)).metrics["test/acc"] == 0.8
    assert begin_job(job, config(0.1, 1)) is None


@pytest.mark.parametrize(("seed", "kept"), [(0, True), (1, False)])
def test_a_checkpoint_is_kept_to_go_on_from_for_the_same_config_alone(tmp_path, seed, kept):
    job, _ = begin(tmp_path, 0.1, 0)
    last_checkpoint(job).parent.mkdir()
    last_checkpoint(job).write_text("weights")
    assert begin_job(job, config(0.1, seed)) is None
    assert last_checkpoint(job).exists() == kept


def test_where_a_sweep_lies_makes_no_other_config(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
    settings = [{"seed": 0, "trainer": {"root": str(tmp_path / place)}} for place in ("here", "there")]
    write_result(tmp_path / "here", {}, None, settings[0])
    (tmp_path / "here" / "metrics.json").rename(tmp_path / "there" / "metrics.json")
    assert begin_job(tmp_path / "there", settings[1]) is not None


def test_states_of_jobs(tmp_path):
    finish(tmp_path, 0.1, 0)
    begin(tmp_path, 0.1, 1)
    fail(tmp_path, 0.1, 2)
    jobs, faults = read_jobs([tmp_path])
    assert [(job.state, job.error, job.sweep) for job in jobs] == [
        ("finished", "", tmp_path.name),
        ("unfinished", "", tmp_path.name),
        ("failed", "ValueError: the reason", tmp_path.name),
    ]
    assert not faults


def test_an_old_result_does_not_count_for_a_newer_config(tmp_path):
    finish(tmp_path, 0.1, 0)
    (job,) = tmp_path.iterdir()
    begin_job(job, config(0.1, 5))
    assert read_job(job).state == "unfinished"


def test_a_file_that_was_cut_is_named_and_left_out(tmp_path):
    sweep(tmp_path, rates=(0.1,))
    broken = sorted(tmp_path.iterdir())[1] / "metrics.json"
    broken.write_text(broken.read_text()[:100])
    jobs, (fault,) = read_jobs([tmp_path])
    assert len(jobs) == 2
    assert str(broken) in fault
    assert begin_job(broken.parent, config(0.1, 1)) is None  # it runs again


def test_runs_are_named_by_what_differs(tmp_path):
    jobs, _ = read_jobs([sweep(tmp_path, seeds=(0,), rates=(0.0, 0.1))])
    assert labels(jobs) == ["ber.rate=0.0", "ber.rate=0.1"]
    several, _ = read_jobs([sweep(tmp_path / name, seeds=(0, 1), rates=(0.1,)) for name in "ab"])
    assert labels(several) == ["a: seed=0", "a: seed=1", "b: seed=0", "b: seed=1"]


def test_a_job_that_runs_says_where(tmp_path):
    job, _ = begin(tmp_path, 0.1, 0)
    (job / ".claim").mkdir()
    owner = replace(claims._this(), host="elsewhere")
    (job / ".claim" / "1").write_text(json.dumps(vars(owner)))
    assert (read_job(job).state, read_job(job).error) == ("running", f"by elsewhere {owner.pid}")


def test_the_reason_is_not_written_into_a_folder_that_was_lost(tmp_path):
    with pytest.raises(KeyboardInterrupt), running(tmp_path, {}):  # noqa: PT012
        claim(tmp_path).lost = True
        written = (tmp_path / "job.json").read_text()
        raise KeyboardInterrupt
    assert (tmp_path / "job.json").read_text() == written


def test_only_the_first_process_of_a_distributed_run_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    begin_job(tmp_path, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("last", "best", "found"),
    [
        ("whole", "whole", "last"),
        ("whole", None, "last"),
        (None, "whole", None),
        ("cut", "whole", "best"),
        ("empty", "whole", "best"),
        ("changed", "whole", "best"),
        ("cut", "empty", None),
        ("cut", None, None),
        ("whole", "cut", None),
    ],
)
def test_a_checkpoint_that_was_cut_costs_the_time_since_the_best_one_or_the_start(tmp_path, capsys, last, best, found):
    """What is tested in the end is the best one: without it nothing counts."""
    folder = last_checkpoint(tmp_path).parent
    folder.mkdir()
    torch.save({"weights": torch.arange(1000.0)}, tmp_path / "whole.ckpt")
    content = (tmp_path / "whole.ckpt").read_bytes()
    middle = len(content) // 2
    changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    contents = {"whole": content, "cut": content[:middle], "empty": b"", "changed": changed}
    for name, state in (("last", last), ("best", best)):
        if state is not None:
            (folder / f"{name}.ckpt").write_bytes(contents[state])
    assert whole_checkpoint(tmp_path) == (None if found is None else folder / f"{found}.ckpt")
    said = capsys.readouterr().out
    for name, state in (("last", last), ("best", best)):
        assert (f"{folder}/{name}.ckpt" in said.partition(": ")[0]) == (state not in ("whole", None))


def test_a_job_that_was_stopped_is_no_failed_one(tmp_path):
    with pytest.raises(StoppedError), running(tmp_path, {}):
        raise StoppedError("stopped by SIGTERM")
    assert (read_job(tmp_path).state, read_job(tmp_path).error) == ("interrupted", "stopped by SIGTERM")


def test_the_reason_comes_out_where_it_can_not_be_written(tmp_path, monkeypatch):
    begin_job(tmp_path, {})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert fail_job(tmp_path, OSError("No space left")) == "train.py failed: OSError: No space left"
    assert json.loads((tmp_path / "job.json").read_text())["state"] == "unfinished"


def test_a_result_that_can_not_be_read_is_made_again(tmp_path):
    job, settings = begin(tmp_path, 0.1, 0)
    own = json.loads((job / "job.json").read_text())["identity"]
    (job / "metrics.json").write_text(json.dumps({"identity": own}))
    assert begin_job(job, settings) is None


TREE = "[" * 100_000
NOTES = ["", "{", "null", "7", '"text"', "[1]", "{}", TREE, '{"state": "lost", "error": ""}', '{"state": "failed"}']
NOTES += [
    '{"state": ["failed"], "error": ""}',
    '{"state": "failed", "error": {"a": 1}}',
    '{"state": NaN, "error": NaN}',
]
NOTES += ['{"state": "finished", "error": ""}', "\x00\x01"]
LISTS = [
    "",
    "{",
    "7",
    "text",
    "- {a: 1}",
    "- [1, 2]",
    "a: 1",
    "- ",
    "- ${",
    "[[[[",
    "&a [*a]",
    "- .nan",
    "\x00",
    "- !!python/object:os.x",
]
RESULTS = [{}, {"metrics": 7}, {"metrics": ["a"]}, {"metrics": {"test/acc": "high"}}, {"metrics": {"test/acc": [0.5]}}]
RESULTS += [{"metrics": {"test/acc": {"a": 1}}}, {"metrics": {"test/acc": None}}, {"metrics": {"test/acc": 10**400}}]
RESULTS += [
    {"config": 7},
    {"config": [1]},
    {"seconds": "7"},
    {"seconds": math.nan},
    {"seconds": -1},
    {"identity": None},
]
RESULTS += [{"further_curves": 7}, {"further_curves": [None]}, {"further_curves": [{}]}, {"curve": 7}, {"curve": []}]
CURVES = [{"rates": 7}, {"rates": ["a", "b"]}, {"rates": [math.nan, 0.1]}, {"rates": []}, {"clean": "0.9"}, {"axis": 7}]
CURVES += [{"accuracy": 7}, {"accuracy": [[]]}, {"accuracy": [[0.5], [0.1, 0.2]]}, {"accuracy": [["a"], ["b"]]}]
CURVES += [{"score": None}, {"bounds": 7}, {"bounds": ["a", "b"]}, {"name": [1]}, {"higher_is_better": "yes"}]


def corrupt(folder):
    """Make a job for each corruption; returns how many."""
    number = 0

    def made():
        nonlocal number
        number += 1
        finish(folder, 0.3, number)
        return next(folder.glob(f"*seed={number},*"))

    for text in NOTES:
        job = made()
        (job / "metrics.json").unlink()
        (job / "job.json").write_text(text)
    for text in LISTS:
        (made() / ".hydra" / "overrides.yaml").write_text(text)
    for part in [*RESULTS, *({"curve": part} for part in CURVES)]:
        path = made() / "metrics.json"
        content = json.loads(path.read_text())
        if isinstance(part.get("curve"), dict):
            part = {"curve": content["curve"] | part["curve"]}
        path.write_text(json.dumps(content | part if part else {}))
    for text in ("", "{", "[]", "7", TREE, "\udcff"):
        (made() / "metrics.json").write_bytes(text.encode(errors="surrogateescape"))
    return number


def test_a_strange_file_costs_its_own_row_alone(tmp_path, capsys):
    """Wrong types, nesting, emptiness, NaN: the other runs are in tables, figures and page as without it."""
    from bnnft.report.__main__ import main

    sweep(tmp_path, seeds=(0,), rates=(0.0, 0.1))
    whole, _ = read_jobs([tmp_path])
    count = corrupt(tmp_path)
    assert count >= 50
    jobs, faults = read_jobs([tmp_path])
    strange_overrides = len(LISTS)
    assert len(faults) == count - strange_overrides
    assert len(jobs) == len(whole) + strange_overrides
    assert {job.folder: job.result.metrics for job in whole}.items() <= {
        j.folder: j.result.metrics for j in jobs
    }.items()
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("left out: ") >= len(faults)
