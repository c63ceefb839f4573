"""Several nodes: the reports of all, and which nodes differ from the others.

Reports travel through the store of torchrun as JSON: nothing that comes from there is run.
"""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from mcore_rl.doctor.rows import Row, Status
from mcore_rl.doctor.site import Node
from mcore_rl.errors import RunError
from mcore_rl.foreign_json import parse_json

_REPORT, _VERDICT = "doctor/report", "doctor/verdict"


@dataclass(frozen=True, slots=True)
class Report:
    """What one node found."""

    number: int
    host: str
    rows: Sequence[Row]
    has_come: bool = True
    """False: the node sent nothing, and the only row says so."""

    @property
    def name(self) -> str:
        """As people are told: "node 1 (gpu-07)"."""
        return f"node {self.number} ({self.host})"

    def to_json(self) -> dict[str, Any]:
        """Return it as an object."""
        rows = [row.to_json() for row in self.rows]
        return {"node": self.number, "host": self.host, "rows": rows}


@dataclass(frozen=True, slots=True)
class Difference:
    """A line in which some nodes differ from the others."""

    name: str
    majority: str
    """The value of more than half of the nodes; "": there is none."""
    outliers: Sequence[tuple[str, str]]
    """(node, its value) of the other nodes."""


class Rendezvous:
    """The nodes of one `mcore-rl doctor --nodes`, as one of them sees them.

    Args:
        node: this one.
        limit_s: how long the others may take.

    Raises:
        RunError: if the store of torchrun cannot be reached.
    """

    def __init__(self, node: Node, limit_s: float) -> None:
        from mcore_rl.launch.torchrun import shared_store  # torch and ZeroMQ, which may be broken

        self._node, self._limit = node, timedelta(seconds=limit_s)
        try:
            self._store = shared_store(is_master=node.number == 0)
        except RuntimeError as error:
            raise _no_rendezvous(error) from error

    def reports(self, rows: Sequence[Row]) -> list[Report]:
        """On node 0: return the reports of all nodes; one that does not come is a fault."""
        found = [Report(0, socket.gethostname(), rows)]
        for number in range(1, self._node.count):
            key = f"{_REPORT}/{number}"
            try:
                self._store.wait([key], self._limit)
                found.append(report_from_json(number, "unknown", self._store.get(key)))
            except (RuntimeError, ValueError) as error:
                what = str(error).splitlines()[0]
                text = f"no report within {self._limit.total_seconds():g} s: {what}"
                row = Row(name="report", found=text, status=Status.FAULT, fix="see its own output")
                found.append(Report(number, "unknown", [row], has_come=False))
        return found

    def send(self, rows: Sequence[Row]) -> bool:
        """On another node: hand in its report; return whether all are healthy and alike.

        Raises:
            RunError: if node 0 is gone, or says nothing.
        """
        report = Report(self._node.number, socket.gethostname(), rows)
        try:
            self._store.set(f"{_REPORT}/{report.number}", json.dumps(report.to_json()))
            self._store.wait([_VERDICT], self._limit)
            return self._store.get(_VERDICT) == b"healthy"
        except RuntimeError as error:
            raise _no_rendezvous(error) from error

    def tell(self, is_healthy: bool) -> None:
        """On node 0: send the result to all nodes, for their exit codes."""
        self._store.set(_VERDICT, "healthy" if is_healthy else "not healthy")


def _no_rendezvous(error: Exception) -> RunError:
    return RunError(f"node 0 does not answer: {str(error).splitlines()[0]}", role="doctor")


def differences(reports: Sequence[Report]) -> list[Difference]:
    """Return the lines that are not equal on all nodes that have reported, in the first node's
    order."""
    reports = [report for report in reports if report.has_come]
    names = dict.fromkeys(row.name for report in reports for row in report.rows)
    found = []
    for name in names:
        has = {report.name: _told(report, name) for report in reports}
        counts = Counter(has.values())
        if len(counts) == 1:
            continue
        ((majority, count),) = counts.most_common(1)
        majority = majority if 2 * count > len(reports) else ("", "")
        others = [(node, text) for node, (_, text) in _unlike(has, majority)]
        found.append(Difference(name, majority[1], others))
    return found


def _unlike(has: dict[str, tuple[str, str]], majority: tuple[str, str]) -> list[Any]:
    return [(node, value) for node, value in has.items() if value != majority]


def _told(report: Report, name: str) -> tuple[str, str]:
    """Return (status, text) of a line: what it is compared by and shown as."""
    for row in report.rows:
        if row.name == name:
            text = row.must_match or row.status
            return row.status, text if row.status is Status.OK else f"{row.status}: {text}"
    return "", "no such line"


def report_from_json(number: int, host: str, text: str | bytes) -> Report:
    """Return the report of a node.

    Args:
        number: of the node.
        host: its name, where the report does not say it.
        text: an object with "rows", as `Report.to_json` and `mcore-rl doctor --json` have it.

    Raises:
        ValueError: if it is none.
    """
    try:
        value = parse_json(text)
        rows = [Row.from_json(row) for row in value["rows"]]
        return Report(number, str(value.get("host", host)), rows)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        shown = text.decode(errors="replace") if isinstance(text, bytes) else text
        raise ValueError(f"no report: {error}; it said {shown[-200:]!r}") from error
