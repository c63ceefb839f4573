"""The loops, by `trainer.loop`."""

from __future__ import annotations

from mcore_rl.loop import on_policy, overlapped

LOOPS = {"on_policy": on_policy.train, "overlapped": overlapped.train}
