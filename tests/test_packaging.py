"""What is installed, from a wheel or in editable form, is the whole package, its data and the configuration groups."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def relative(folder, pattern):
    return {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob(pattern) if path.suffix != ".pyc"}


MODULES = {
    ".".join(["bnnft", *path.with_suffix("").parts]).removesuffix(".__init__") for path in relative("bnnft", "*.py")
}
DATA = {f"bnnft/{path}" for path in relative("bnnft", "*.*") if path.suffix != ".py"}
GROUPS = {f"bnnft/conf/{path}" for path in relative("conf", "*.yaml")}

BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
# what was built comes before what is installed here
PREPARE = """
import json, site, sys
sys.path[:] = [sys.argv[1], *json.loads(sys.argv[2])]
finders = len(sys.meta_path)
site.addsitedir(sys.argv[1])
sys.meta_path[:] = sys.meta_path[finders:] + sys.meta_path[:finders]
"""
IMPORT_ALL = """
import importlib, pkgutil
import bnnft
names = ["bnnft", *(module.name for module in pkgutil.walk_packages(bnnft.__path__, "bnnft."))]
print(json.dumps({name: importlib.import_module(name).__file__ for name in {*names, "bnnft.conf"}}))
"""
COMPOSE = """
from pathlib import Path
from hydra import compose, initialize_config_dir
with initialize_config_dir(str(Path.cwd()), version_base="1.3"):
    print(json.dumps(dict(compose("project", ["ber.rate=0.25"]).ber)))
"""
PROJECT = """
defaults: [_self_, ber: independent]
hydra: {searchpath: ["pkg://bnnft.conf"]}
"""


def built(folder, hook):
    """Build from a copy of the sources, offline, and unpack what came of it; returns the folder."""
    source = folder / "source"
    for name in ("bnnft", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-c", BUILD, hook, folder]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "unpacked")
    return folder / "unpacked"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return built(tmp_path_factory.mktemp("wheel"), "build_wheel")


@pytest.fixture(scope="module")
def editable(tmp_path_factory):
    return built(tmp_path_factory.mktemp("editable"), "build_editable")


def fresh(folder, code, cwd):
    """Run code in a process that knows of no bnnft but the one in the folder; returns what it printed."""
    paths = [
        path
        for path in sys.path
        if Path(path or ".").resolve() not in (ROOT, ROOT / "tests", ROOT / "tests" / "foreign")
    ]
    command = [sys.executable, "-S", "-c", PREPARE + code, folder, json.dumps(paths)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_wheel_holds_every_module_and_data_file_and_nothing_else(wheel):
    files = {path.relative_to(wheel) for path in wheel.rglob("*") if path.is_file()}
    modules = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files if path.suffix == ".py"}
    data = {path.as_posix() for path in files if path.suffix != ".py" and not path.parts[0].endswith(".dist-info")}
    assert modules == MODULES | {"bnnft.conf"}
    assert data == DATA | GROUPS
    assert {"bnnft/py.typed", "bnnft/report/page.html", "bnnft/report/page.js"} <= DATA
    assert {path.split("/")[2] for path in GROUPS} >= {"train.yaml", "ber", "callbacks", "model", "logger", "hydra"}


def test_every_module_of_the_wheel_can_be_imported(wheel, tmp_path):
    files = fresh(wheel, IMPORT_ALL, tmp_path)
    assert files.keys() == MODULES | {"bnnft.conf"}
    assert all(Path(file).is_relative_to(wheel) for file in files.values())


def test_every_module_of_the_editable_form_is_that_of_the_sources(editable, tmp_path):
    files = fresh(editable, IMPORT_ALL, tmp_path)
    assert files.keys() == MODULES | {"bnnft.conf"}
    source = editable.parent / "source"
    assert {name for name, file in files.items() if not Path(file).is_relative_to(source)} == set()


@pytest.mark.parametrize("form", ["wheel", "editable"])
def test_another_project_finds_the_configuration_groups(form, request, tmp_path):
    """By `hydra.searchpath: [pkg://bnnft.conf]`, in a folder where no source tree is at hand."""
    (tmp_path / "project.yaml").write_text(PROJECT)
    composed = fresh(request.getfixturevalue(form), COMPOSE, tmp_path)
    assert composed == {"_target_": "bnnft.ber.Independent", "rate": 0.25}


COMMAND = """
import atexit
from importlib.metadata import entry_points
from pathlib import Path
written = lambda path: (path / "metrics.json").exists() and (path / "train.log").exists()
done = lambda: sorted(path.name for path in Path("multirun").glob("*/*") if written(path))
atexit.register(lambda: print(json.dumps(done())))  # after the table of the sweep
sys.argv = ["bnnft", "-m", "ber.rate=0,0.1", "trainer.max_epochs=1", "model.widths=[32]", "logger=csv"]
(command,) = entry_points(group="console_scripts", name="bnnft")
command.load()()
"""


def test_the_command_of_the_wheel_is_train_py(wheel, tmp_path):
    jobs = fresh(wheel, COMMAND, tmp_path)
    assert [job.split(",")[0] for job in jobs] == ["ber.rate=0", "ber.rate=0.1"]
