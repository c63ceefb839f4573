"""The findings as a table for people: at most 100 columns, with the commands that fix them below,
where they can be copied."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mcore_rl.doctor.nodes import Difference, Report
from mcore_rl.doctor.rows import Row, Status
from mcore_rl.printable import printable

_WIDTH = 100
_LOUD = {Status.FAULT: "bold red", Status.WARNING: "yellow", Status.OK: "green"}


def print_rows(rows: Sequence[Row]) -> None:
    """Print the findings of one machine."""
    table = _table("", "check", "found", "wanted")
    for row in rows:
        style = _LOUD.get(row.status, "dim")
        table.add_row(Text(row.status, style), _text(row.name), _text(row.found), _text(row.wanted))
    _console().print(table)


def print_fixes(reports: Sequence[Report]) -> None:
    """Print every warning and fault with the command that fixes it; once if nodes have the same."""
    nodes_of: dict[tuple[str, str, str, str], list[Report]] = {}
    for report in reports:
        for row in report.rows:
            if row.status in (Status.WARNING, Status.FAULT):
                key = row.status, row.name, row.found, row.fix
                nodes_of.setdefault(key, []).append(report)
    for (status, name, found, fix), nodes in nodes_of.items():
        where = f" of {', '.join(node.name for node in nodes)}" if len(reports) > 1 else ""
        _write(f"{status}: {name}{where}: {found}")
        if fix:
            _write(f"  fix: {fix}")


def print_differences(differences: Sequence[Difference], reports: Sequence[Report]) -> None:
    """Print by name how nodes differ from the others."""
    if not differences:
        count = sum(report.has_come for report in reports)
        _write(f"{count} of {len(reports)} nodes have come, and are alike")
        return
    table = _table("what differs", "most nodes", "outliers")
    for one in differences:
        others = "\n".join(f"{node}: {text}" for node, text in one.outliers)
        table.add_row(_text(one.name), _text(one.majority or "no majority"), _text(others))
    _console().print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _text(text: str) -> Text:
    return Text(printable(text))


def _console() -> Console:
    width = min(shutil.get_terminal_size((_WIDTH, 0)).columns, _WIDTH)
    return Console(file=sys.stdout, width=width, highlight=False, markup=False)


def _write(line: str) -> None:
    """Write a line as it is, so that a command in it can be copied."""
    sys.stdout.write(f"{printable(line)}\n")
