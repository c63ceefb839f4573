"""The blocks of code of a response: what stands between two fences of backticks or tildes.

A fence opens at the end of a line, may name a language, and at the start of a line further
attributes:

    ```python        ```py title="a.py"        ``` {.python .numbers}        ~~~ Python3

A block ends with a line that begins or ends with the same number of the same marks, or where
another block begins that names its language. In a list it is indented; the code is what remains
without the indentation of its first line. A block without an end does not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_PYTHON = ("python", "py", "python3", "py3")
_LANGUAGE = re.compile(r"\s*\{?\s*\.?([\w+#-]*)")
_NAME = re.compile(r"[\w+#-]+")
_NAME_OR_NOTHING = re.compile(r"[\w+#-]*\s*")


def last_program(response: str) -> str | None:
    """Return the code of the last Python block, or of the last block, or None."""
    last_block = last_python = None
    for language, code in _blocks(response):
        last_block = code
        if language in _PYTHON:
            last_python = code
    return last_block if last_python is None else last_python


def _blocks(response: str) -> Iterator[tuple[str, str]]:
    """Yield the language, in lower case, and the code of every block that ends."""
    fence, language, lines = "", "", []
    for line in response.split("\n"):
        line = line.rstrip("\r")
        opened = _opening(line)
        text = line.strip()
        is_named = fence and text.startswith(fence) and _NAME.fullmatch(text.lstrip(fence[0]))
        if opened is not None and (not fence or is_named):
            (fence, language), lines = opened, []
        elif fence and text.startswith(fence):
            yield language, _code(lines)
            fence = ""
        elif fence and text.endswith(fence):
            yield language, _code([*lines, line.rstrip().rstrip(fence[0])])
            fence = ""
        else:
            lines.append(line)


def _opening(line: str) -> tuple[str, str] | None:
    """Return the fence with which a line could open a block, and the language it names."""
    for mark in "`~":
        head, found, info = line.rpartition(mark)
        before = head.rstrip(mark)
        length = len(head) - len(before) + len(found)
        is_alone = not before.strip()
        is_fence = is_alone or (
            mark == "`" and "```" not in before and _NAME_OR_NOTHING.fullmatch(info)
        )
        if length >= 3 and is_fence:
            named = _LANGUAGE.match(info)
            assert named is not None  # it matches nothing too
            return mark * length, named[1].lower()
    return None


def _code(lines: list[str]) -> str:
    """Return the lines without the indentation of the first that has a text."""
    indent = next((_indent(line) for line in lines if line.strip()), 0)
    return "".join(f"{line[min(indent, _indent(line)) :]}\n" for line in lines)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
