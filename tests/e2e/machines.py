"""Two machines on one: network namespaces with addresses of their own, joined by a cable."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.e2e import commands

ADDRESSES = ("10.213.0.1", "10.213.0.2")
_ENDED_S = 20


class UnmakeableError(Exception):
    """This system lets nobody make namespaces; says why."""


class Machines:
    """Both machines; everything that runs on one ends with `stop` of it."""

    def __init__(self) -> None:
        self._names = [f"mcore-{os.getpid()}-{number}" for number in (0, 1)]
        self._ends = [f"mc{os.getpid()}{number}" for number in "ab"]
        try:
            for name in self._names:
                _ip("netns", "add", name)
            _ip("link", "add", self._ends[0], "type", "veth", "peer", "name", self._ends[1])
            for name, end, address in zip(self._names, self._ends, ADDRESSES, strict=True):
                _ip("link", "set", end, "netns", name)
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
                _ip("-n", name, "link", "set", end, "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            self.remove()
            said = getattr(error, "stderr", None) or str(error)
            raise UnmakeableError(str(said).strip()) from error

    def start(
        self, number: int, *argv: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start `python -m argv` on a machine."""
        return subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{self._names[number]}", sys.executable, "-m", *argv],
            env=commands.ENVIRONMENT | dict(environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def stop(self, number: int) -> None:
        """kill -9 of everything on a machine."""
        deadline = time.monotonic() + _ENDED_S
        while pids := self._pids(number):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert time.monotonic() < deadline, f"processes {pids} do not end"
            time.sleep(0.05)

    def unplug(self) -> None:
        """Let nothing through any more."""
        _ip("-n", self._names[1], "link", "set", self._ends[1], "down")

    def remove(self) -> None:
        for number, name in enumerate(self._names):
            if Path(f"/run/netns/{name}").exists():
                self.stop(number)
                subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def _pids(self, number: int) -> list[int]:
        listed = subprocess.run(
            ["ip", "netns", "pids", self._names[number]], capture_output=True, text=True, check=True
        ).stdout
        found = []
        for pid in map(int, listed.split()):
            with contextlib.suppress(OSError):
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                found += [pid] if state != "Z" else []
        return found


def _ip(*argv: str) -> None:
    subprocess.run(["ip", *argv], check=True, capture_output=True, text=True)
