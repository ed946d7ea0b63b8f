"""The law of the house: a room imports only rooms to its left, and the edge stays at the edge."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [
    {"nn", "ber", "tracing", "plots"},
    {"loss", "model", "dataset"},
    {"injection"},
    {"metrics", "compensation"},
    {"evaluation"},
    {"classifier", "loggers", "runs"},
    {"callbacks", "report"},
    {"train"},
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
ALLOWED = {
    "lightning": {"classifier", "dataset", "callbacks", "loggers", "train"},
    "hydra": {"train", "runs", "report"},
    "omegaconf": {"train", "runs", "report"},
    "wandb": set(),
}
FILES = sorted(path for path in (ROOT / "bnnft").rglob("*.py") if path != ROOT / "bnnft" / "__init__.py")


def room(path):
    relative = path.relative_to(ROOT).with_suffix("").parts
    return relative[1] if relative[0] == "bnnft" else relative[0]


def imports(path):
    """Every imported module, also inside of functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "bnnft")


@pytest.mark.parametrize("path", [*FILES, ROOT / "train.py"], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_rooms_to_its_left(path):
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "bnnft" and rest:
            other = rest.split(".")[0]
            assert RANK[other] < RANK[room(path)] or other == room(path)
        assert room(path) in ALLOWED.get(top, {room(path)}), f"{path} imports {name}"


def test_every_room_has_a_rank():
    assert {room(path) for path in FILES} <= RANK.keys()


def test_importing_the_package_pulls_in_no_edge():
    code = "import sys, bnnft; print([m for m in ('hydra', 'wandb', 'lightning', 'matplotlib') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
