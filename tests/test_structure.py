"""Files are about one thing: short files, classes and functions, and a test file beside each of them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bnnft"
FILES = sorted(PACKAGE.rglob("*.py"))
LIMITS = {"lines of a file": 250, "lines of a class": 150, "lines of a function": 60, "attributes of a class": 12}
# files that are tested from elsewhere only
UNTESTED = {
    "ber/bram28.py",
    "ber/preset.py",
    "ber/rram.py",
    "ber/sram14.py",
    "ber/sram65.py",
    "injection/injection.py",
    "injection/window.py",
    "metrics/found.py",
    "metrics/layers.py",
    "tracing/mode.py",
    "tracing/sharding.py",
    "tracing/ways.py",
}


def attributes(node):
    """Names that the methods of a class set on self."""
    targets = (n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
    return {target.attr for target in targets if isinstance(target.value, ast.Name) and target.value.id == "self"}


def sizes(name, text):
    """Yield the kind, the place and the size of everything that has a limit."""
    yield "lines of a file", name, text.count("\n")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            kind, place = "class" if isinstance(node, ast.ClassDef) else "function", f"{name}:{node.name}"
            yield f"lines of a {kind}", place, node.end_lineno - node.lineno + 1
            if kind == "class":
                yield "attributes of a class", place, len(attributes(node))


def above(name, text):
    return {(kind, place): size for kind, place, size in sizes(name, text) if size > LIMITS[kind]}


def test_files_classes_and_functions_stay_short_and_classes_small():
    found = {}
    for path in FILES:
        found |= above(path.relative_to(PACKAGE).as_posix(), path.read_text())
    assert found == {}
    assert (ROOT / "train.py").read_text().count("\n") < 80


@pytest.mark.parametrize(
    ("text", "kind", "place"),
    [
        ("\n" * 251, "lines of a file", "a.py"),
        ("class A:\n" + "    x = 1\n" * 150, "lines of a class", "a.py:A"),
        ("class A:\n    def f(self):\n" + "        pass\n" * 60, "lines of a function", "a.py:f"),
        ("async def f():\n" + "    pass\n" * 60, "lines of a function", "a.py:f"),
        (
            "class A:\n    def f(self):\n" + "".join(f"        self.a{i}, b = 0, 0\n" for i in range(13)),
            "attributes of a class",
            "a.py:A",
        ),
    ],
)
def test_a_limit_is_seen_where_it_is_passed_and_not_before(text, kind, place):
    assert above("a.py", text).keys() == {(kind, place)}
    *shorter, _ = text.splitlines(keepends=True)
    assert above("a.py", "".join(shorter)) == {}


def test_each_file_has_its_test_file():
    files = {path.relative_to(PACKAGE) for path in FILES if not path.name.startswith("__")}
    without = {path.as_posix() for path in files if not (ROOT / "tests" / path.parent / f"test_{path.name}").is_file()}
    assert without - UNTESTED == set()
    assert UNTESTED - without == set(), "tested now, or gone: remove from the list"
