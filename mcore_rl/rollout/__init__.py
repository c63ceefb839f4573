"""Rollout engines. A new one is a file here and a line in `load_engine`."""

from __future__ import annotations

from mcore_rl.rollout.base import ENGINES, EngineSpec, RolloutEngine


def load_engine(spec: EngineSpec) -> RolloutEngine:
    """Start the engine named by `rollout.name`; imports only that one's library.

    Raises:
        UserError: if there is no such engine.
    """
    name = spec.config.name
    if name == "vllm":
        import mcore_rl.rollout.vllm_engine
    elif name == "fake":
        import mcore_rl.rollout.fake_engine  # noqa: F401
    return ENGINES.get(name)(spec)
