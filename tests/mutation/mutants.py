"""All the small ways in which a module can be made wrong: a comparison turned, a number moved, a statement gone.

A mutant is made in the syntax tree, so lines stay where they are; what decides no value (texts, annotations,
docstrings, the line of an error) is left alone. The operators are those of DeMillo, Lipton & Sayward (1978), "Hints
on test data selection", and their kin.
"""

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

COMPARED = {
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
}
COMPUTED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
Change = Callable[[ast.AST], ast.AST]


@dataclass(frozen=True)
class Mutant:
    """One wrong module."""

    file: str
    """Below src/."""
    number: int
    """Among the module's mutants."""
    line: int
    kind: str
    was: str
    becomes: str

    @property
    def key(self) -> str:
        return f"{self.file}:{self.line}:{self.number}"


def _changes(node: ast.AST) -> Iterator[tuple[str, Change]]:
    """The mutations of one node; each is given a copy of it and may change that."""
    if isinstance(node, ast.Compare):
        for n, op in enumerate(node.ops):
            if type(op) in COMPARED:
                yield "comparison", lambda new, n=n, op=op: _set(new, "ops", n, COMPARED[type(op)]())
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in COMPUTED:
        yield "arithmetic", lambda new: _set(new, "op", None, COMPUTED[type(new.op)]())
    elif isinstance(node, ast.BoolOp):
        yield "boolean", lambda new: _set(new, "op", None, ast.Or() if isinstance(new.op, ast.And) else ast.And())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield "boolean" if isinstance(node.op, ast.Not) else "arithmetic", lambda new: new.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", lambda new: _set(new, "value", None, not new.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        other = node.value + 1 if isinstance(node.value, int) else node.value * 2 or 1.0
        yield "constant", lambda new: _set(new, "value", None, other)
    if (
        isinstance(node, (ast.AugAssign, ast.Raise, ast.Delete, ast.Continue, ast.Break))
        or (isinstance(node, ast.Expr) and not isinstance(node.value, (ast.Constant, ast.Yield)))
        or (isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Attribute, ast.Subscript)))
    ):
        yield "statement", lambda new: ast.Pass()


def _set(node: ast.AST, name: str, at: int | None, value: object) -> ast.AST:
    if at is None:
        setattr(node, name, value)
    else:
        getattr(node, name)[at] = value
    return node


def _places(node: ast.AST, path: tuple[tuple[str, int | None], ...] = ()) -> Iterator[tuple[ast.AST, tuple]]:
    """All nodes whose value decides something, each with the way to it."""
    yield node, path
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params", "msg") or isinstance(
            value, ast.JoinedStr
        ):
            continue
        if isinstance(node, ast.Raise) and name == "exc":
            continue  # which error is raised is told by its words
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        for at, child in enumerate(value) if isinstance(value, list) else ((None, value),):
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                yield from _places(child, (*path, (name, at)))


def _at(tree: ast.AST, path: tuple[tuple[str, int | None], ...]) -> ast.AST:
    for name, at in path:
        tree = getattr(tree, name) if at is None else getattr(tree, name)[at]
    return tree


def mutants(file: str, source: str) -> Iterator[Mutant]:
    """Each mutant of a module."""
    number = 0
    for node, _ in _places(ast.parse(source)):
        for kind, change in _changes(node):
            was, becomes = ast.unparse(node), ast.unparse(change(copy.deepcopy(node)))
            yield Mutant(file, number, node.lineno, kind, was.split("\n")[0][:100], becomes.split("\n")[0][:100])
            number += 1


def mutated(source: str, mutant: Mutant) -> ast.Module:
    """The whole of a module's mutant."""
    tree, number = ast.parse(source), 0
    for node, path in list(_places(tree)):
        for _, change in _changes(node):
            if number == mutant.number:
                new = ast.copy_location(change(copy.deepcopy(node)), node)
                name, at = path[-1]
                _set(_at(tree, path[:-1]), name, at, new)
                return ast.fix_missing_locations(tree)
            number += 1
    raise AssertionError(f"{mutant.key} is of another source")
