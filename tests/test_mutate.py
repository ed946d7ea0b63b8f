"""The mutants of `mutate.py` are those that a reader of the source would think of, and each is one place of it."""

import ast

import pytest
from mutate import Reach, stages
from mutations import Source, mutants


def lines(text):
    """What the mutants of a source make of its lines."""
    return [mutant.after for mutant in Source("a.py", text.encode()).mutants()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a < b", ["pass", "(a <= b)"]),
        ("a = b >= c", ["a = (b > c)"]),
        ("a = b is not None", ["a = (b is None)"]),
        ("a = b + c * d", ["a = (b - c * d)", "a = b + (c / d)"]),
        ("a = b and c", ["a = (b or c)"]),
        ("a = not b", ["a = (b)"]),
        ("a = -b", ["a = (b)"]),
        ("a = True", ["a = False"]),
        ("a = 1", ["a = 2"]),
        ("a = 0.5", ["a = 1.0"]),
        ("a = 0.0", ["a = 1.0"]),
        ("a = 'b'", ["a = 'bX'"]),
        ("a = None", []),
        ("a = b[1:c]", ["a = b[1 + 1:c]", "a = b[1:c - 1]", "a = b[2:c]"]),
        ("a = b[:]", ["a = b[1:]"]),
        ("a = b(c, d=e, f=g)", ["a = b(c, f=g)", "a = b(c, d=e)"]),
        ("a = b(**c)", []),
        ("a = [b for b in c if d]", ["a = [b for b in c if True]"]),
        ("a = b if c else d", ["a = b if (not (c)) else d"]),
        ("def f():\n    return a", ["return None"]),
        ("def f():\n    return None", []),
        ("a.b = c", ["pass"]),
        ("a = c", []),
        ("a -= c", ["pass"]),
        ("while a:\n    break", ["while (not (a)):", "continue"]),
        ("if a:\n    raise ValueError('text' + b)", ["if (not (a)):", "pass"]),
        ('"""Docstring."""\na = f"text {1}"', []),
        ("def f(a: 'A' = 1) -> 'B': ...", ["def f(a: 'A' = 2) -> 'B': ..."]),
        ("@torch.no_grad()\ndef f(): ...", ["@(lambda function: function)"]),
        ("class A:\n    @property\n    def f(self): ...", []),
    ],
)
def test_mutants_of_a_line(text, expected):
    assert sorted(lines(text)) == sorted(expected)


def test_a_mutant_changes_one_place_and_says_which():
    text = '''def f(a):
    """Ä."""
    return a


class A:
    ä = "ö"

    @staticmethod
    def g(b):
        return b + 1
'''
    found = [m for m in Source("a.py", text.encode()).mutants() if m.after == "return (b - 1)"]
    (mutant,) = found
    assert (mutant.where, mutant.line, mutant.lines) == ("A.g", 11, (9, 11))
    assert str(mutant) == "a.py [A.g] return b + 1 -> return (b - 1)"
    assert mutant.applied(text.encode()).decode() == text.replace("b + 1", "(b - 1)")


def test_every_mutant_of_the_package_is_a_program(pytestconfig):
    found = mutants(pytestconfig.rootpath, "bnnft")
    assert len(found) > 1000
    for mutant in found[::20]:
        source = (pytestconfig.rootpath / mutant.path).read_bytes()
        assert mutant.applied(source) != source
        ast.parse(mutant.applied(source))


def test_a_mutant_is_given_to_the_tests_that_call_its_function_nearest_and_quickest_first():
    text = "def f():\n    return 1\n\n\ndef g():\n    return 2\n"
    mutant = next(m for m in Source("bnnft/ber/a.py", text.encode()).mutants() if m.where == "g")
    reached = {
        "tests/test_all.py::slow": Reach(2.0, frozenset({("bnnft/ber/a.py", 5)})),
        "tests/ber/test_a.py::slow": Reach(2.0, frozenset({("bnnft/ber/a.py", 5), ("bnnft/ber/a.py", 1)})),
        "tests/ber/test_a.py::f": Reach(1.0, frozenset({("bnnft/ber/a.py", 1)})),
        "tests/ber/test_a.py::quick": Reach(1.0, frozenset({("bnnft/ber/a.py", 5)})),
        "tests/test_all.py::other": Reach(1.0, frozenset({("bnnft/ber/b.py", 5)})),
        "bnnft/ber/a.py::bnnft.ber.a.g": Reach(3.0, frozenset({("bnnft/ber/a.py", 5)})),
    }
    near = ["tests/ber/test_a.py::quick", "tests/ber/test_a.py::slow", "bnnft/ber/a.py::bnnft.ber.a.g"]
    assert stages(mutant, reached) == (near, ["tests/test_all.py::slow"])
