"""Small changes of Python source that a test should notice."""

import ast
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

OTHER = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
# without these decorators nothing works at all, which any test notices
STRUCTURAL = {"property", "staticmethod", "classmethod", "contextmanager", "abstractmethod", "overload", "dataclass"}
Named = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Mutant:
    """One change of a file: its bytes from start to end become the text.

    Attributes:
        path: relative to the root of the project.
        start, end, text: the change.
        lines: first and last line of the outermost function around it, or else of the class or of the file.
        where: names of the functions and classes around it.
        line: number of the changed line.
        before, after: what the change makes of it.
    """

    path: str
    start: int
    end: int
    text: str
    lines: tuple[int, int]
    where: str
    line: int
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.path} [{self.where}] {self.before} -> {self.after}"

    def applied(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]


def mutants(root: Path, path: str) -> list[Mutant]:
    """Return all mutants of a file or of the files of a folder; ``__init__`` files have none."""
    if (root / path).is_dir():
        files = sorted((root / path).rglob("*.py"))
        return [mutant for file in files for mutant in mutants(root, file.relative_to(root).as_posix())]
    return [] if Path(path).name == "__init__.py" else list(Source(path, (root / path).read_bytes()).mutants())


class Source:
    """One file of source and its mutants."""

    def __init__(self, path: str, text: bytes) -> None:
        self.path, self.text, self.tree = path, text, ast.parse(text)
        self.rows = [0, *accumulate(map(len, text.splitlines(keepends=True)))]

    def mutants(self) -> Iterator[Mutant]:
        for around, node in walk(self.tree, ()):
            for place, text in changes(node):
                mutant = self.mutant(around, place, text)
                if mutant.before != mutant.after:
                    yield mutant

    def mutant(self, around: tuple[Named, ...], place: Any, text: str) -> Mutant:
        start = self.rows[place.lineno - 1] + place.col_offset
        end = self.rows[place.end_lineno - 1] + place.end_col_offset
        line, stop = self.rows[place.lineno - 1], self.rows[place.end_lineno]
        shown = (self.text[line:stop], self.text[line:start] + text.encode() + self.text[end:stop])
        before, after = (" ".join(part.decode().split()) for part in shown)
        outer: Any = next(
            (node for node in around if not isinstance(node, ast.ClassDef)), around[0] if around else None
        )
        lines = (1, len(self.rows))
        if outer is not None:
            lines = (min(node.lineno for node in [outer, *outer.decorator_list]), outer.end_lineno)
        where = ".".join(node.name for node in around)
        return Mutant(self.path, start, end, text, lines, where, place.lineno, before, after)


def walk(node: ast.AST, around: tuple[Named, ...]) -> Iterator[tuple[tuple[Named, ...], ast.AST]]:
    """Yield nodes with the functions and classes around them, but annotations, docstrings and texts of messages."""
    yield around, node
    if isinstance(node, Named):
        around = (*around, node)
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns") or (isinstance(node, ast.Raise) and field == "exc"):
            continue
        for child in value if isinstance(value, list) else [value]:
            docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            # the parts of an f-string have no place of their own
            if isinstance(child, ast.AST) and not docstring and not isinstance(child, ast.JoinedStr):
                yield from walk(child, around)


def changes(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Yield what to replace, and by which text."""
    match node:
        case ast.Compare(ops=operators):
            for place, operator in enumerate(operators):
                others = [*operators[:place], OTHER[type(operator)](), *operators[place + 1 :]]
                yield node, f"({changed(node, ops=others)})"
        case ast.BinOp(op=operator) | ast.BoolOp(op=operator) if type(operator) in OTHER:
            yield node, f"({changed(node, op=OTHER[type(operator)]())})"
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield node, f"({ast.unparse(operand)})"
        case ast.Constant(value=bool(value)):
            yield node, str(not value)
        case ast.Constant(value=int(value)):
            yield node, str(value + 1)
        case ast.Constant(value=float(value)):
            yield node, repr(2 * value or 1.0)
        case ast.Constant(value=str(value)):
            yield node, repr(f"{value}X")
        case ast.Slice(lower=lower, upper=upper):
            one = ast.Constant(1)
            yield node, changed(node, lower=one if lower is None else ast.BinOp(lower, ast.Add(), one))
            if upper is not None:
                yield node, changed(node, upper=ast.BinOp(upper, ast.Sub(), one))
        case ast.Call(keywords=keywords):
            for keyword in keywords:
                if keyword.arg is not None:
                    yield node, changed(node, keywords=[other for other in keywords if other is not keyword])
        case ast.comprehension(ifs=tests):
            yield from ((test, "True") for test in tests)
        case _:
            yield from changes_of_statement(node)
    if isinstance(node, ast.If | ast.IfExp | ast.While) and not isinstance(node.test, ast.UnaryOp):
        yield node.test, f"(not ({ast.unparse(node.test)}))"


def changes_of_statement(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Yield what to replace in a statement, and by which text."""
    match node:
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) != "None":
            yield node, "return None"
        case ast.Expr() | ast.AugAssign() | ast.Delete() | ast.Raise():
            yield node, "pass"
        case ast.Assign(targets=targets) if any(isinstance(t, ast.Attribute | ast.Subscript) for t in targets):
            yield node, "pass"
        case ast.Continue():
            yield node, "break"
        case ast.Break():
            yield node, "continue"
        case ast.FunctionDef(decorator_list=decorators):
            for decorator in decorators:
                if ast.unparse(decorator).split("(")[0].split(".")[-1] not in STRUCTURAL:
                    yield decorator, "(lambda function: function)"


def changed(node: ast.AST, **fields: Any) -> str:
    """Return the text of a node with other fields."""
    node = copy(node)
    for name, value in fields.items():
        setattr(node, name, value)
    return ast.unparse(node)
