"""Questions to the syntax trees of assertions."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable, Iterator


class SplitError(Exception):
    """The reason why assertions cannot be split."""


def compare_by_type(node: ast.AST) -> ast.AST:
    """Return a comparison of a value of the program in which True is not 1."""
    assert isinstance(node, ast.Compare)
    if len(node.ops) != 1:
        return node
    [operator], left, [right] = node.ops, node.left, node.comparators
    if isinstance(right, ast.Name) and right.id.startswith("_value_"):
        same = _same(right, left)
    else:
        same = _same(left, right)
    match operator, right:
        case ast.Eq(), _:
            return same
        case ast.NotEq(), _:
            return ast.UnaryOp(op=ast.Not(), operand=same)
        case ast.In(), ast.List(elts=[_, *_]) | ast.Tuple(elts=[_, *_]) | ast.Set():
            # A value that is a name costs nothing to repeat.
            if isinstance(left, ast.Name):
                return ast.BoolOp(op=ast.Or(), values=[_same(left, item) for item in right.elts])
    return node


def _same(value: ast.expr, expected: ast.expr) -> ast.Call:
    return ast.Call(
        func=ast.Name(id="_is_same", ctx=ast.Load()), args=[value, expected], keywords=[]
    )


def names_in(node: ast.AST, context: type[ast.expr_context] | None = None) -> Iterator[ast.Name]:
    """Yield the names in an expression or statement, those in one context if one is given."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and (context is None or isinstance(part.ctx, context)):
            yield part


def bound_by(statement: ast.stmt) -> set[str]:
    """Return the names that a statement without the program binds."""
    match statement:
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return {(name.asname or name.name).partition(".")[0] for name in names}
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
    return {name.id for name in names_in(statement, ast.Store)}


def is_fixed(statement: ast.stmt) -> bool:
    """Whether the value that a statement binds cannot be changed by a function that receives it."""
    if isinstance(statement, ast.Assign):
        return isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)


def inline(function: ast.FunctionDef, call: ast.Call) -> list[ast.stmt]:
    """Return the body of a function of the text with the arguments of a call: `check(add)`."""
    names = [argument.arg for argument in function.args.args]
    if (
        len(names) != len(call.args)
        or call.keywords
        or ast.dump(function.args)
        != ast.dump(
            ast.arguments(
                posonlyargs=[], args=function.args.args, kwonlyargs=[], kw_defaults=[], defaults=[]
            )
        )
    ):
        raise SplitError(f"it calls its own {function.name}() in an unusual way")
    if any(name.id in names for name in names_in(function, ast.Store)):
        raise SplitError(f"its own {function.name}() changes its arguments")
    arguments = dict(zip(names, call.args, strict=True))

    class Substitute(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return arguments.get(node.id, node)

    return [Substitute().visit(copy.deepcopy(statement)) for statement in function.body]


def is_of_module(node: ast.expr) -> bool:
    """Whether an expression calls what is in a module."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)


def truths_of(test: ast.expr) -> Iterator[ast.expr]:
    """Yield the expressions whose truth, and no more, an assertion asks for."""
    match test:
        case ast.BoolOp(values=values):
            for value in values:
                yield from truths_of(value)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield from truths_of(operand)
        case ast.Compare(left=left, comparators=[ast.Constant(True | False)]):
            yield from truths_of(left)
        case _:
            yield test


def arguments_of(node: ast.expr) -> Iterator[ast.expr]:
    """Yield the arguments of the last call of an expression."""
    if isinstance(node, ast.Call):
        yield from node.args
        yield from (keyword.value for keyword in node.keywords)


def yields_plain(node: ast.AST, results: Iterable[str]) -> bool:
    """Whether an expression is what a function returned, and no new object of a class."""
    match node:
        case ast.Name(id=name):
            return name in results
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return not name[:1].isupper()
    return False
