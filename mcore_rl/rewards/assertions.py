"""Split assertions into calls of the program and the checks on its answers.

`assert add(1, 2) == 3` becomes the expression `add(1, 2)`, which the program's process evaluates,
and the verdict `_value_0 == 3`, which no program ever sees. What belongs to the program is a name
that the assertions neither import nor assign nor find in Python, with the calls, attributes and
items that follow it; its arguments go to the program, all else does not:

    assert math.isclose(area(2), 12.566, rel_tol=1e-3)    asks area(2)
    assert sorted(f([2, 1])) == [1, 2], "wrong"           asks f([2, 1])
    stack = Stack(); stack.push(1); assert stack.pop() == 1    does the first two, asks stack.pop()

A method of Python's own types on what a function returns (`f(2).startswith("a")`) is part of the
verdict, so that no object of the program decides. Where the parts cannot be told from each other,
the assertions are refused: a loop around them, a program's value on both sides of a comparison, an
assertion about nothing of the program, or one that only the program decides about its own results
(`assert is_valid(solve(3))`).
"""

from __future__ import annotations

import ast
import builtins
import copy
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mcore_rl.jail.plain_data import encode
from mcore_rl.rewards.assertion_syntax import (
    SplitError,
    arguments_of,
    bound_by,
    compare_by_type,
    inline,
    is_fixed,
    is_of_module,
    names_in,
    truths_of,
    yields_plain,
)

_WELL_KNOWN = {
    "isclose": "math",
    "Counter": "collections",
    "OrderedDict": "collections",
    "defaultdict": "collections",
    "deque": "collections",
    "Decimal": "decimal",
    "Fraction": "fractions",
}
"""Names that assertions use without importing them, and their modules."""
_MODULES = {name: name for name in sys.stdlib_module_names} | {"np": "numpy", "numpy": "numpy"}
_BUILTINS = frozenset(dir(builtins))
_PLAIN_TYPES = (str, bytes, int, float, complex, list, tuple, dict, set, frozenset, range)
_PLAIN_ATTRIBUTES = frozenset(name for kind in _PLAIN_TYPES for name in dir(kind))


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitAssertions:
    """Assertions in two parts."""

    steps: Sequence[tuple[str, str]]
    """What the program's process does, for `Sandbox.evaluate`."""
    verdict: str
    """What must hold of the values, for `Sandbox.judge`."""
    literals: Sequence[Any] | None
    """The value that each expression must have, as `jail.plain_data` writes it, where nothing else
    is asserted and none of them is a set or a mapping."""


def split_assertions(texts: Sequence[str]) -> list[SplitAssertions | str]:
    """Return the parts of each text of assertions about one program, or why it has none.

    Raises:
        ValueError: for the first that is no Python.
    """
    modules = [_parse(text) for text in texts]
    of_program = frozenset(name for module in modules for name in _shadowed_builtins(module))
    return [_split(*pair, of_program) for pair in zip(texts, modules, strict=True)]


def _parse(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{_shown(text)} is no Python ({error})") from None


def _split(text: str, module: ast.Module, of_program: frozenset[str]) -> SplitAssertions | str:
    try:
        return _Splitter(of_program).split(module)
    except SplitError as reason:
        return f"{_shown(text)} cannot be taken apart: {reason}"
    except RecursionError:
        return f"{_shown(text)} cannot be taken apart: it is nested too deeply"


def _shown(text: object) -> str:
    return f"assertion {' '.join(str(text).split())[:80]!r}"


def _shadowed_builtins(module: ast.Module) -> Iterator[str]:
    """Yield the builtin function that an assertion about no other name must be about: tasks ask for
    functions called `sum` or `max`."""
    for statement in module.body:
        if isinstance(statement, ast.Assert):
            splitter = _Splitter(frozenset())
            tested = statement.test
            if splitter.has_part(tested):
                continue
            sides = [tested.left, *tested.comparators] if isinstance(tested, ast.Compare) else []
            for side in sides or [tested]:
                if isinstance(side, ast.Call) and isinstance(side.func, ast.Name):
                    if side.func.id in _BUILTINS or side.func.id in _WELL_KNOWN:
                        yield side.func.id
                    break


@dataclass(slots=True)
class _Splitter:
    """Goes through one text from its first statement to its last."""

    of_program: frozenset[str]
    """Builtin names that the program defines."""
    objects: set[str] = field(default_factory=set)
    """Variables that hold objects of the program."""
    results: set[str] = field(default_factory=set)
    """Variables that hold what the program's functions returned."""
    own: set[str] = field(default_factory=set)
    """Names that the text itself imports, assigns or defines without the program."""
    steps: list[tuple[str, str]] = field(default_factory=list)
    givens: list[ast.stmt] = field(default_factory=list)
    """Statements without the program so far."""
    verdict: list[ast.stmt] = field(default_factory=list)
    num_values: int = 0
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    """Of its own, such as `def check(candidate)`."""
    modules: dict[str, str] = field(default_factory=dict)
    """Names that the verdict uses without importing them."""

    def split(self, module: ast.Module) -> SplitAssertions:
        """Return the parts.

        Raises:
            SplitError: if there are none, saying why.
        """
        for statement in module.body:
            self._take(statement)
        if not self.num_values:
            raise SplitError("it asks nothing of the program")
        imports = [
            ast.parse(
                f"import {where} as {name}" if name in _MODULES else f"from {where} import {name}"
            )
            for name, where in self.modules.items()
        ]
        lines = [*imports, *self.verdict]
        return SplitAssertions(
            steps=self.steps,
            verdict="\n".join(ast.unparse(line) for line in lines),
            literals=self._literals(),
        )

    def _take(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                self._give(statement, [(n.asname or n.name).partition(".")[0] for n in names])
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                if self._has_foreign_name(statement):
                    raise SplitError(f"its own {name}() uses names of the program")
                self._give(statement, [name])
                if isinstance(statement, ast.FunctionDef):
                    self.functions[name] = statement
            case ast.Assign(targets=targets, value=value):
                self._assign(statement, targets, value)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(statement, [target], value)
            case ast.Expr(value=ast.Constant()) | ast.Pass() | ast.Assert(test=ast.Constant(True)):
                pass
            case ast.Expr(value=ast.Call(func=ast.Name(id=name)) as call) if name in self.functions:
                for inner in inline(self.functions[name], call):
                    self._take(inner)
            case ast.Expr(value=value):
                if self.has_part(value):
                    self._do(statement, value)
                    self._read_back(value)
                elif is_of_module(value):  # random.seed(0)
                    self._provide(value)
                    self.steps.append(("exec", ast.unparse(statement)))
                    self.verdict.append(statement)
            case ast.Assert(test=test):
                self._assert(test)
            case _:
                kind = type(statement).__name__.lower()
                raise SplitError(f"there is a statement of the kind `{kind}` in it")

    def _give(self, statement: ast.stmt, names: Iterable[str]) -> None:
        """Keep a statement that does not use the program, for later statements that need it."""
        self.own.update(names)
        self.givens.append(statement)
        self.verdict.append(statement)

    def _assign(self, statement: ast.stmt, targets: Sequence[ast.expr], value: ast.expr) -> None:
        names = [n.id for target in targets for n in names_in(target)]
        touches = {n.id for target in targets for n in names_in(target, ast.Load)}
        if touches:
            raise SplitError("it changes a part of a variable")
        if not self.has_part(value):
            self.results.difference_update(names)
            self.objects.difference_update(names)
            self._give(statement, names)
            return
        self.own.difference_update(names)
        if not self._belongs(value):  # 2 * f(3): the program could answer for the 2
            raise SplitError("it assigns more than a value of the program")
        self._do(statement, value)
        plain = self.results if yields_plain(value, self.results) else self.objects
        plain.update(names)

    def _do(self, statement: ast.stmt, value: ast.expr) -> None:
        """Let the program's process run a statement."""
        if not self._belongs(value):
            raise SplitError("a statement is of the program only in part")
        self._provide(value)
        self.steps.append(("exec", ast.unparse(statement)))

    def _read_back(self, value: ast.expr) -> None:
        """Take the variables of the text that a statement passed for results: `sort(values)`."""
        fixed = {name for given in self.verdict if is_fixed(given) for name in bound_by(given)}
        passed = {name.id for name in names_in(value)} & self.own - fixed
        self.results.update(passed)
        self.own.difference_update(passed)

    def _provide(self, value: ast.AST) -> None:
        """Let the program's process run the statements that `value` needs and that have not run."""
        needed = {name.id for name in names_in(value)}
        chosen = []
        for given in reversed(self.givens):
            if needed & bound_by(given):
                chosen.append(given)
                needed |= {name.id for name in names_in(given)}
        for given in reversed(chosen):
            self.steps.append(("exec", ast.unparse(given)))
            self.givens = [statement for statement in self.givens if statement is not given]

    def _assert(self, test: ast.expr) -> None:
        before = self.num_values
        for truth in truths_of(test):
            if self._belongs(truth) and any(map(self.has_call, arguments_of(truth))):
                raise SplitError("the program alone decides about its own results")
        tested = self._outside(copy.deepcopy(test), frozenset())
        if self.num_values == before:
            raise SplitError(f"`{ast.unparse(test)[:60]}` asks nothing of the program")
        self.verdict.append(ast.Assert(test=tested, msg=None))

    def _outside(self, node: Any, bound: frozenset[str]) -> Any:
        """Return an expression of the verdict: values of the program are replaced by names."""
        if isinstance(node, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom):
            raise SplitError("there is an assignment inside of it")
        if isinstance(node, ast.expr) and self._belongs(node):
            return self._ask(node, bound)
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp) and self._belongs(
            node.elt, {n.id for g in node.generators for n in names_in(g.target)}
        ):
            return self._ask_for_all(node, bound)
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            bound |= {name.id for g in node.generators for name in names_in(g.target)}
        if isinstance(node, ast.Lambda):
            bound |= {
                argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)
            }
        if isinstance(node, ast.Call):
            passed = [item for item in arguments_of(node) if isinstance(item, ast.Name)]
            for name in (item.id for item in passed):
                if self._is_foreign(name, bound) and name not in self.results:
                    taker = ast.unparse(node.func)
                    raise SplitError(f"`{name}` itself is passed to {taker}()")
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if sum(self.has_part(side, bound) for side in sides) > 1:
                raise SplitError("values of the program are compared with each other")
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            raise SplitError(f"it uses {node.attr}")  # `__eq__` says NotImplemented, which is true
        if isinstance(node, ast.Name) and node.id not in bound:
            self._find(node.id)
        compares = isinstance(node, ast.Compare) and self.has_part(node, bound)
        for name, content in ast.iter_fields(node):
            if isinstance(content, ast.AST):
                setattr(node, name, self._outside(content, bound))
            elif isinstance(content, list):
                setattr(
                    node,
                    name,
                    [self._outside(c, bound) if isinstance(c, ast.AST) else c for c in content],
                )
        return compare_by_type(node) if compares else node

    def _ask(self, node: ast.expr, bound: frozenset[str]) -> ast.Name:
        names = {name.id for name in names_in(node)}
        if names & bound:
            raise SplitError("the program is asked inside of a loop")
        for part in ast.walk(node):
            if isinstance(part, ast.Attribute) and part.attr.startswith("_"):
                raise SplitError(f"it uses {part.attr}")
            if isinstance(part, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom):
                raise SplitError("there is an assignment inside of it")
            if (
                isinstance(part, ast.Call)
                and isinstance(part.func, ast.Attribute)
                and yields_plain(part.func.value, self.results)
                and self._belongs(part)
                and [*arguments_of(part)]
            ):  # solve(3).equals(expected)
                raise SplitError("a result of the program decides about itself")
        self._provide(node)
        self.steps.append(("eval", ast.unparse(node)))
        self.num_values += 1
        return ast.Name(id=f"_value_{self.num_values - 1}", ctx=ast.Load())

    def _ask_for_all(self, node: Any, bound: frozenset[str]) -> ast.expr:
        """Return a name for the values of the program in a comprehension of only such values."""
        if any(self.has_part(g.iter) or any(map(self.has_part, g.ifs)) for g in node.generators):
            raise SplitError("the program is asked inside of a loop")
        values = self._ask(ast.ListComp(elt=node.elt, generators=node.generators), bound)
        if isinstance(node, ast.SetComp):
            return ast.Call(func=ast.Name(id="set", ctx=ast.Load()), args=[values], keywords=[])
        return values

    def has_part(self, node: ast.AST, bound: Iterable[str] = ()) -> bool:
        """Whether something in the expression belongs to the program."""
        inside = set(bound)
        for part in ast.walk(node):
            if isinstance(part, ast.comprehension):
                inside |= {name.id for name in names_in(part.target)}
            if isinstance(part, ast.arg):
                inside.add(part.arg)
        return any(
            isinstance(part, ast.Name | ast.Call) and self._belongs(part, inside)
            for part in ast.walk(node)
        )

    def has_call(self, node: ast.AST) -> bool:
        """Whether the program is called in the expression."""
        return any(isinstance(part, ast.Call) and self._belongs(part) for part in ast.walk(node))

    def _belongs(self, node: ast.AST, bound: Iterable[str] = ()) -> bool:
        """Whether an expression is the program's as a whole."""
        match node:
            case ast.Name(id=name):
                return self._is_foreign(name, bound)
            case ast.Call(func=ast.Name(id=name)) if name in _MODULES and name not in self.own:
                return name not in bound
            case ast.Call(func=ast.Name(id=name), args=[ast.Name(id=argument)]) if (
                name in _BUILTINS and argument in self.objects
            ):
                return True  # len(stack)
            case ast.Call(func=function):
                return self._belongs(function, bound)
            case ast.Attribute(value=value, attr=attribute):
                is_plain = yields_plain(value, self.results) and attribute in _PLAIN_ATTRIBUTES
                return self._belongs(value, bound) and not is_plain
            case ast.Subscript(value=value):
                return self._belongs(value, bound) and not yields_plain(value, self.results)
        return False

    def _is_foreign(self, name: str, bound: Iterable[str]) -> bool:
        if name in self.objects or name in self.results or name in self.of_program:
            return True
        known = (self.own, bound, _BUILTINS, _MODULES, _WELL_KNOWN)
        return not any(name in names for names in known)

    def _has_foreign_name(self, definition: ast.AST) -> bool:
        bound = {name.id for name in names_in(definition, ast.Store)}
        bound |= {part.arg for part in ast.walk(definition) if isinstance(part, ast.arg)}
        bound |= {
            part.name
            for part in ast.walk(definition)
            if isinstance(part, ast.FunctionDef | ast.ClassDef)
        }
        return any(self._is_foreign(name.id, bound) for name in names_in(definition, ast.Load))

    def _find(self, name: str) -> None:
        """Note a module that the verdict uses and nobody imports."""
        if name in self.own or name in _BUILTINS:
            return
        if (where := _MODULES.get(name) or _WELL_KNOWN.get(name)) is not None:
            self.modules[name] = where

    def _literals(self) -> list[Any] | None:
        """Return what each value must equal, if the verdict says so of every one in turn."""
        literals = []
        for statement in self.verdict:
            match statement:
                case ast.Assert(
                    test=ast.Call(
                        func=ast.Name(id="_is_same"),
                        args=[ast.Name(id=name), expected],
                        keywords=[],
                    )
                ) if name == f"_value_{len(literals)}":
                    try:
                        content = encode(ast.literal_eval(expected))
                    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                        return None
                    if any(f'["{kind}"' in json.dumps(content) for kind in ("set", "dict")):
                        return None
                    literals.append(content)
                case _:
                    return None
        return literals if len(literals) == self.num_values else None
