"""Rollout engines. A new one is a file here, and a function and a line below."""

from __future__ import annotations

from mcore_rl.rollout.base import ENGINES, EngineFactory, EngineKind, EngineSpec, RolloutEngine
from mcore_rl.weight_sync.base import Link


def _vllm() -> EngineFactory:
    from mcore_rl.rollout.vllm_engine import VllmEngine

    return VllmEngine


def _fake() -> EngineFactory:
    from mcore_rl.rollout.fake_engine import FakeEngine

    return FakeEngine


ENGINES.add("vllm", EngineKind(load=_vllm, cuts_heads=True))
ENGINES.add("fake", EngineKind(load=_fake, has_texts=False))


def load_engine(spec: EngineSpec, link: Link) -> RolloutEngine:
    """Start the engine named by `rollout.name`; imports only the library of that engine.

    Args:
        spec: what it starts from.
        link: brings its weights.

    Raises:
        UserError: if there is no such engine.
    """
    return import_engine(spec.config.name)(spec, link)


def import_engine(name: str) -> EngineFactory:
    """Import the library of an engine and return what makes it."""
    return ENGINES.get(name).load()
