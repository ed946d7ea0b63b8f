import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from bnnft.runs import claim as claims
from bnnft.runs.claim import DEAD_AFTER, FolderTakenError, Owner, claim, claimed, owner_of

# loads one file alone, so that a process starts in no time, and keeps what it got until its input ends
OTHER = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("claim", {claims.__file__!r})
module = sys.modules["claim"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from pathlib import Path
print("ready", flush=True)
sys.stdin.readline()
try:
    module.claim(Path(sys.argv[1]))
    print("owner", flush=True)
except module.FolderTakenError as taken:
    print(taken.owner, flush=True)
sys.stdin.readline()
"""


def start(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def go(*processes):
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    return [process.stdout.readline().strip() for process in processes]


def end(*processes):
    for process in processes:
        process.kill()
        process.communicate()


def write(folder, number=1, **owner):
    """The claim of another process."""
    place = folder / ".claim"
    place.mkdir(exist_ok=True)
    (place / str(number)).write_text(json.dumps(asdict(replace(claims._this(), **owner))))
    return place / str(number)


@pytest.mark.parametrize("dead", [0, 1])
def test_one_of_several_processes_wins_and_the_others_are_told_which(tmp_path, dead):
    """Also where all of them find the claim of a process that is dead."""
    for number in range(dead):
        write(tmp_path, number + 1, start="earlier")
    processes = [start(tmp_path) for _ in range(6)]
    try:
        said = go(*processes)
        (winner,) = [process for process, word in zip(processes, said, strict=True) if word == "owner"]
        assert set(said) == {"owner", f"{claims._this().host} {winner.pid}"}
        assert str(owner_of(tmp_path)) in said
        with pytest.raises(FolderTakenError, match=f"is run by {owner_of(tmp_path)}"):
            claim(tmp_path)
    finally:
        end(*processes)
    with claimed(tmp_path):  # they are dead
        assert len(list((tmp_path / ".claim").iterdir())) == 1


def test_a_process_that_nobody_has_waited_for_is_dead(tmp_path):
    process = start(tmp_path)
    go(process)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is still listed
    assert owner_of(tmp_path) is None
    end(process)


def test_a_folder_is_free_again_when_it_was_released_and_numbers_never_go_back(tmp_path):
    for number in (1, 2, 3):
        with claimed(tmp_path) as own:
            assert own.path.name == str(number)
            assert claim(tmp_path) is own  # as Hydra's callback may have claimed it before
        assert owner_of(tmp_path) is None
        assert [path.name for path in (tmp_path / ".claim").iterdir()] == [str(number)]


def test_an_owner_on_another_machine_is_dead_when_it_gave_no_sign_of_life_for_long(tmp_path):
    path = write(tmp_path, host="elsewhere")
    with pytest.raises(FolderTakenError, match="elsewhere"):
        claim(tmp_path)
    old = time.time() - DEAD_AFTER - 60
    os.utime(path, (old, old))
    with claimed(tmp_path) as own:
        assert own.path.name == "2"
        assert not path.exists()


def test_a_container_of_the_same_machine_has_numbers_of_its_own(tmp_path):
    write(tmp_path, pid=2**22 + 1, numbers="pid:[1]")
    assert owner_of(tmp_path) is not None


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"host": 3}'])
def test_a_claim_that_is_just_written_is_one_and_a_strange_old_one_is_none(tmp_path, text):
    path = write(tmp_path)
    path.write_text(text)
    with pytest.raises(FolderTakenError):
        claim(tmp_path)
    os.utime(path, (0, 0))
    with claimed(tmp_path):
        pass


def test_file_systems_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    with claimed(tmp_path):
        assert owner_of(tmp_path) is None  # it is this process
        assert Owner(**json.loads((tmp_path / ".claim" / "1").read_text())) == claims._this()
    assert not claims._create(tmp_path / ".claim" / "1")


def test_an_owner_that_was_taken_for_dead_is_interrupted_and_writes_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT", 0.01)
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path) as own:  # noqa: PT012
        path = write(tmp_path, number=2, host="elsewhere")
        text = path.read_text()
        while True:
            time.sleep(0.01)
    assert own.lost
    assert path.read_text() == text


def test_a_heartbeat_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT", 0.01)
    with claimed(tmp_path) as own:
        os.utime(own.path, (0, 0))
        while own.path.stat().st_mtime == 0:
            time.sleep(0.01)


def test_further_processes_of_a_distributed_run_claim_nothing(tmp_path, monkeypatch):
    write(tmp_path, host="elsewhere")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with claimed(tmp_path) as own:
        assert own is None
