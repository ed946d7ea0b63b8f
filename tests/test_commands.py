"""Processes that the tests start faster are what `python SCRIPT` starts: each law compares with the latter."""

import os
import signal

import pytest
from commands import Started, completed, finished

LOOK = """
import sys, os, atexit, threading
atexit.register(lambda: print("at exit"))
main = sys.modules["__main__"]
print(sys.argv, sys.path, os.getcwd(), sorted(os.environ.items()), main is not None and vars(main) is globals())
print(__name__, __file__, __spec__, sys.stdin.read() == "")
"""

ENDS = {
    "end": "threading.Thread(target=lambda: print('a thread')).start()",
    "exit": "sys.exit()",
    "exit code": "sys.exit(3)",
    "exit with words": "sys.exit('words')",
    "error": "raise ValueError('bad')",
    "signal": "os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_script_sees_and_ends_as_in_a_new_process_of_python(tmp_path, end):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "script.py").write_text(LOOK + "sys.stdout.flush()\n" + end)
    environment = os.environ | {"ONLY": "here", "PYTHONPATH": os.pathsep.join(["first", str(tmp_path)])}
    where = {"cwd": tmp_path, "env": environment}
    ours, theirs = (completed("folder/script.py", "a", "b c", anew=anew, **where) for anew in (False, True))
    assert ours.returncode == theirs.returncode
    assert ours.stdout == theirs.stdout
    assert ours.stderr.splitlines()[-1:] == theirs.stderr.splitlines()[-1:]
    assert ("Traceback" in ours.stderr) == ("Traceback" in theirs.stderr)


def test_nothing_of_the_code_under_test_is_there_before(tmp_path):
    (tmp_path / "script.py").write_text("import sys; print([name for name in sys.modules if name.startswith('bnnft')])")
    assert completed(tmp_path / "script.py").stdout == "[]\n"


def test_processes_start_with_random_states_of_their_own(tmp_path):
    (tmp_path / "script.py").write_text("import random, numpy; print(random.random(), numpy.random.rand())")
    first, second = (completed(tmp_path / "script.py").stdout.split() for _ in range(2))
    assert not set(first) & set(second)


def test_a_process_can_be_killed_and_one_that_fails_ends_those_that_wait_for_it(tmp_path):
    (tmp_path / "waits.py").write_text("import signal; signal.pause()")
    (tmp_path / "fails.py").write_text("raise SystemExit(7)")
    alone = Started(tmp_path / "waits.py")
    alone.kill()
    assert alone.wait().returncode == -signal.SIGKILL
    together = [Started(tmp_path / "waits.py"), Started(tmp_path / "fails.py")]
    assert [done.returncode for done in finished(together)] == [-signal.SIGKILL, 7]
