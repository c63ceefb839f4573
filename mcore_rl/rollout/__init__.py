"""Rollout engines. A new one is a file here and a line in `load_engine`."""

from __future__ import annotations

from mcore_rl.rollout.base import ENGINES, EngineSpec, RolloutEngine
from mcore_rl.weight_sync.base import Link


def load_engine(spec: EngineSpec, link: Link) -> RolloutEngine:
    """Start the engine named by `rollout.name`; imports only that one's library.

    Args:
        spec: what it starts from.
        link: by which its weights come.

    Raises:
        UserError: if there is no such engine.
    """
    name = spec.config.name
    import_engine(name)
    return ENGINES.get(name)(spec, link)


def import_engine(name: str) -> None:
    """Import the library of an engine."""
    if name == "vllm":
        import mcore_rl.rollout.vllm_engine
    elif name == "fake":
        import mcore_rl.rollout.fake_engine  # noqa: F401
