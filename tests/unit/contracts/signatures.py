"""Signatures read from the source of packages that need not be importable: no device, no compiled
part, no dependency of theirs is wanted.

A call binds if the real function takes its arguments: as many positions, these keywords, and no
required one missing, unless the call has a `*` or `**` that may hold it.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


class UnknownNameError(Exception):
    """A name that the sources do not have."""


@dataclass(frozen=True)
class Found:
    """A definition, and the module that it stands in."""

    module: str
    node: Definition


class Sources:
    """Packages by their folders.

    Args:
        roots: folders that hold packages, as those of sys.path.
    """

    def __init__(self, *roots: Path) -> None:
        self._roots = roots
        self._trees: dict[str, ast.Module] = {}

    def tree(self, module: str) -> ast.Module:
        if module not in self._trees:
            file = self._file(module)
            if file is None:
                raise UnknownNameError(f"there is no module {module}")
            self._trees[module] = ast.parse(file.read_text(encoding="utf-8"))
        return self._trees[module]

    def has(self, module: str) -> bool:
        return self._file(module) is not None

    def _file(self, module: str) -> Path | None:
        for root in self._roots:
            path = root.joinpath(*module.split("."))
            for file in (path / "__init__.py", path.with_suffix(".py")):
                if file.is_file():
                    return file
        return None

    def find(self, module: str, name: str) -> Found:
        """Return the function or class that a module has under this name, wherever it is from.

        Raises:
            UnknownNameError: if there is none.
        """
        for statement in _statements(self.tree(module).body):
            if isinstance(statement, Definition) and statement.name == name:
                return Found(module, statement)
        for statement in _statements(self.tree(module).body):
            if isinstance(statement, ast.ImportFrom):
                source = self._source(module, statement)
                for alias in statement.names:
                    if (alias.asname or alias.name) == name:
                        return self.find(source, alias.name)
                    if alias.name == "*":
                        try:
                            return self.find(source, name)
                        except UnknownNameError:
                            continue
            for target in _lazy_names(statement).get(name, ()):
                return self.find(f"{module}{target.partition(':')[0]}", target.partition(":")[2])
        raise UnknownNameError(f"{module} has no {name}")

    def _source(self, module: str, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or ""
        file = self._file(module)
        assert file is not None
        parts = module.split(".")
        if file.name == "__init__.py":
            parts.append("")
        parts = parts[: -statement.level]
        return ".".join([*parts, *filter(None, [statement.module])])

    def mro(self, found: Found) -> Iterator[Found]:
        """Yield a class and those that it inherits from, as far as they are in the sources."""
        yield found
        assert isinstance(found.node, ast.ClassDef)
        for base in found.node.bases:
            name = base.value if isinstance(base, ast.Subscript) else base
            try:
                if isinstance(name, ast.Name):
                    yield from self.mro(self.find(found.module, name.id))
            except UnknownNameError:
                continue

    def method(self, found: Found, name: str) -> Function:
        """Return a method of a class or of one that it inherits from.

        Raises:
            UnknownNameError: if there is none.
        """
        for one in self.mro(found):
            assert isinstance(one.node, ast.ClassDef)
            for statement in one.node.body:
                if isinstance(statement, Function) and statement.name == name:
                    return statement
        raise UnknownNameError(f"{found.module}.{found.node.name} has no {name}")

    def fields(self, found: Found) -> list[str]:
        """Return the annotated names of a class and of those that it inherits from."""
        names: list[str] = []
        for one in reversed([*self.mro(found)]):
            assert isinstance(one.node, ast.ClassDef)
            for statement in one.node.body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    names.append(statement.target.id)
        return names

    def signature(self, found: Found) -> inspect.Signature:
        """Return the signature of a function, or of making an instance of a class."""
        if isinstance(found.node, Function):
            return signature_of(found.node)
        try:
            return signature_of(self.method(found, "__init__"), drop=1)
        except UnknownNameError:
            kind, default = inspect.Parameter.POSITIONAL_OR_KEYWORD, object()
            fields = dict.fromkeys(self.fields(found))
            return inspect.Signature(
                [inspect.Parameter(name, kind, default=default) for name in fields]
            )


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements, also those within conditions and guards."""
    for statement in body:
        yield statement
        for part in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try):
                yield from _statements(getattr(statement, part, []))
        for handler in getattr(statement, "handlers", []):
            yield from _statements(handler.body)


@functools.cache
def _lazy_names(statement: ast.stmt) -> dict[str, tuple[str, ...]]:
    """Return what a table of lazy imports says: {"LLM": ".entrypoints.llm:LLM"}."""
    value = getattr(statement, "value", None)
    if not isinstance(value, ast.Dict):
        return {}
    return {
        str(key.value): (str(item.value),)
        for key, item in zip(value.keys, value.values, strict=True)
        if isinstance(key, ast.Constant)
        and isinstance(item, ast.Constant)
        and str(item.value).startswith(".")
    }


def signature_of(function: Function, drop: int = 0) -> inspect.Signature:
    """Return the signature of a function, without its first `drop` parameters."""
    arguments, kinds = function.args, inspect.Parameter
    plain = [*arguments.posonlyargs, *arguments.args]
    required = len(plain) - len(arguments.defaults)
    parameters = []
    for number, argument in enumerate(plain):
        is_only = number < len(arguments.posonlyargs)
        kind = kinds.POSITIONAL_ONLY if is_only else kinds.POSITIONAL_OR_KEYWORD
        default = kinds.empty if number < required else None
        parameters.append(kinds(argument.arg, kind, default=default))
    if arguments.vararg:
        parameters.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    for argument, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        default = kinds.empty if value is None else None
        parameters.append(kinds(argument.arg, kinds.KEYWORD_ONLY, default=default))
    if arguments.kwarg:
        parameters.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(parameters[drop:])


def is_bound_to_class(function: Function) -> bool:
    """Whether it is called on a class with the class as its first argument."""
    return any(isinstance(x, ast.Name) and x.id == "classmethod" for x in function.decorator_list)


def bind(signature: inspect.Signature, call: ast.Call) -> None:
    """Raise a TypeError unless the signature takes the arguments of the call."""
    positions = [one for one in call.args if not isinstance(one, ast.Starred)]
    keywords = {one.arg: one.value for one in call.keywords if one.arg is not None}
    is_whole = len(positions) == len(call.args) and len(keywords) == len(call.keywords)
    (signature.bind if is_whole else signature.bind_partial)(*positions, **keywords)
