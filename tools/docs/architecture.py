"""The picture of which folder may import which, drawn from the table that a test enforces.

A folder stands above all that it may import. Where a row of the table names one module of a folder
alone (`rollout.base`), the line is dashed; it counts for the height unless it would close a circle.
Lines that follow from others are left out, and so are the files of the package's root, which all
may import.
"""

from __future__ import annotations

import ast
import html
from collections.abc import Mapping
from pathlib import Path

RULES = Path(__file__).parents[2] / "tests" / "unit" / "test_import_boundaries.py"

BOX_W, BOX_H, GAP_X, GAP_Y, MARGIN = 104, 34, 20, 56, 20
BLUE, GREY = "#3f51b5", "#9e9e9e"

Graph = Mapping[str, frozenset[str]]
"""Folder -> folders."""


def svg() -> str:
    """Return the picture."""
    whole, parts = read_rules()
    graph = without_circles(whole, parts)
    rows = in_rows(graph)
    width = max(len(row) for row in rows) * (BOX_W + GAP_X) - GAP_X + 2 * MARGIN
    height = (len(rows) + 1) * (BOX_H + GAP_Y) - GAP_Y + 2 * MARGIN
    lines = direct(graph)
    places = _places(rows, lines, width)
    body = [
        *(
            _line(places[a], places[b], is_part=b not in whole[a])
            for a, names in lines.items()
            for b in sorted(names | (parts[a] - graph[a]))
        ),
        *(_box(name, x, y, BOX_W) for name, (x, y) in places.items()),
        _box(
            "types, errors, metrics and the other files of the root: for all",
            MARGIN,
            height - MARGIN - BOX_H,
            width - 2 * MARGIN,
        ),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13">\n'
        "<title>Which folder of mcore_rl may import which</title>\n"
        f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def read_rules() -> tuple[Graph, Graph]:
    """Return what each folder may import whole, and of what it may import single modules."""
    tree = ast.parse(RULES.read_text())
    tables = {
        ast.unparse(node.targets[0]): node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
    }
    of_the_root = set(ast.literal_eval(tables["ROOT_FILES"]))
    rows = {
        name: names
        for name, names in ast.literal_eval(tables["MAY_IMPORT"]).items()
        if name not in of_the_root
    }
    whole = {name: frozenset(x for x in names if "." not in x) for name, names in rows.items()}
    parts = {
        name: frozenset(x.split(".")[0] for x in names if "." in x) - whole[name] - {name}
        for name, names in rows.items()
    }
    return whole, parts


def in_rows(graph: Graph) -> list[list[str]]:
    """Return the folders in rows, from the top: each above all that it imports. Folders that import
    each other stand side by side."""
    reached = {name: _reached(graph, name) for name in graph}
    heights: dict[str, int] = {}

    def height(name: str) -> int:
        if name not in heights:
            below = [x for x in graph[name] if name not in reached[x]]
            beside = [x for x in reached[name] if name in reached[x] and x != name]
            below += [x for one in beside for x in graph[one] if one not in reached[x]]
            heights[name] = 1 + max((height(x) for x in below), default=-1)
        return heights[name]

    top = max(height(name) for name in graph)
    return [[name for name in graph if heights[name] == level] for level in range(top, -1, -1)]


def without_circles(whole: Graph, parts: Graph) -> Graph:
    """Return the lines of `whole`, and those of `parts` that close no circle with them."""
    graph = dict(whole)
    for name, names in parts.items():
        for other in sorted(names):
            if name not in _reached(graph, other):
                graph[name] |= {other}
    return graph


def direct(graph: Graph) -> Graph:
    """Return the lines of `graph` that no longer way says too."""
    reached = {name: _reached(graph, name) for name in graph}
    return {
        name: frozenset(
            x
            for x in names
            if not any(x in reached[y] and y not in reached[x] for y in names if y not in (x, name))
        )
        for name, names in graph.items()
    }


def _reached(graph: Graph, start: str) -> set[str]:
    found: set[str] = set()
    ahead = [*graph[start]]
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead += graph[name]
    return found


def _places(rows: list[list[str]], graph: Graph, width: int) -> dict[str, tuple[float, float]]:
    """Return the upper left corner of each box. From below, a folder stands above the middle of
    what it imports, as far as its row has room; rows are centred."""
    places: dict[str, tuple[float, float]] = {}
    for number, row in reversed(list(enumerate(rows))):
        left = (width - len(row) * (BOX_W + GAP_X) + GAP_X) / 2

        def middle(name: str) -> float:
            below = [places[x][0] for x in graph[name] if x in places]
            return sum(below) / len(below) if below else width / 2

        for column, name in enumerate(sorted(row, key=middle)):
            places[name] = (left + column * (BOX_W + GAP_X), MARGIN + number * (BOX_H + GAP_Y))
    return places


def _line(start: tuple[float, float], end: tuple[float, float], *, is_part: bool) -> str:
    down = end[1] >= start[1]
    x1, y1 = start[0] + BOX_W / 2, start[1] + (BOX_H if down else 0)
    x2, y2 = end[0] + BOX_W / 2, end[1] + (0 if down else BOX_H)
    if start[1] == end[1]:  # side by side: an arc below both
        y2 = y1
    bend = max(abs(y2 - y1) / 2, GAP_Y / 2) * (1 if down else -1)
    other = -bend if start[1] != end[1] else bend
    style = f'{GREY}" stroke-dasharray="3 4' if is_part else BLUE
    return (
        f'<path d="M{x1:g} {y1:g}C{x1:g} {y1 + bend:g} {x2:g} {y2 + other:g} {x2:g} {y2:g}" '
        f'fill="none" stroke="{style}"/>'
    )


def _box(text: str, x: float, y: float, width: float) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{BOX_H}" rx="6" fill="#e8eaf6" '
        f'stroke="{BLUE}"/>'
        f'<text x="{x + width / 2:g}" y="{y + 22:g}" text-anchor="middle" fill="#1a237e">'
        f"{html.escape(text)}</text>"
    )
