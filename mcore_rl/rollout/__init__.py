"""Rollout engines. A new one is a file here and a line in `load_engine`."""

from __future__ import annotations

from mcore_rl.rollout.base import ENGINES, EngineSpec, RolloutEngine


def load_engine(spec: EngineSpec) -> RolloutEngine:
    """Start the engine named by `rollout.name`; imports only that one's library.

    Raises:
        UserError: if there is no such engine.
    """
    name = spec.config.name
    import_engine(name)
    return ENGINES.get(name)(spec)


def import_engine(name: str) -> None:
    """Import the library of an engine."""
    if name == "vllm":
        import mcore_rl.rollout.vllm_engine
    elif name == "fake":
        import mcore_rl.rollout.fake_engine  # noqa: F401
