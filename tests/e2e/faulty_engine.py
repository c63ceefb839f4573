"""Plug-in of the command: the fake engine, which fails once, where and how a test wants it, or is
busy for a while.

A signal is sent from within, in the midst of a step or of an update; the processes that are watched
cannot tell.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

from mcore_rl.rollout.base import ENGINES, EngineKind
from mcore_rl.rollout.fake_engine import FakeEngine

FAULT, ONCE = "FAULTY_ENGINE_FAULT", "FAULTY_ENGINE_ONCE"
"""Environment: "<kind> <phase> <version>", and a file that says by its lines when it happened."""
_PATHS = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = {"MCORE_RL_PLUGINS": "faulty_engine", "PYTHONPATH": os.pathsep.join(_PATHS)}
BUSY_US = 9_000_000
"""Longer than an engine that is stopped may be silent."""


def is_due(kind: str, phase: str, version: int) -> bool:
    """Return whether this is what is asked for, for the first time in any process."""
    if os.environ.get(FAULT) != f"{kind} {phase} {version}":
        return False
    with contextlib.suppress(FileExistsError), open(os.environ[ONCE], "x") as file:
        file.write(str(time.monotonic()))
        return True
    return False


class FaultyEngine(FakeEngine):
    """A `RolloutEngine` that can be killed, stopped, or answer garbage."""

    def step(self):
        ended = super().step()
        if is_due("garbage", "generate", self.weight_version):
            version = [replace(s, version=7) for s in ended[0][1].versions] if ended else []
            ended = [(number, replace(result, versions=version)) for number, result in ended]
        self._strike("generate", self.weight_version)
        if is_due("busy", "generate", self.weight_version):
            ctypes.PyDLL(None).usleep(BUSY_US)  # and no other thread of Python runs meanwhile
        return ended

    def update_weights(self, update):
        super().update_weights(update)
        self._strike("update", self._coming_version)

    def _strike(self, phase, version):
        for number in ("SIGKILL", "SIGSTOP"):
            if is_due(number, phase, version):
                os.kill(os.getpid(), signal.Signals[number])
                time.sleep(60)


ENGINES.add("faulty", EngineKind(load=lambda: FaultyEngine, has_texts=False))
