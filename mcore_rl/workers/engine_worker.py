"""An engine in a process of its own, as the controller reaches it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mcore_rl.rollout.hosts.process import OwnProcessEngine, UpdateListener
from mcore_rl.rollout.hosts.server import ServerEngine
from mcore_rl.rollout.serving import ServingEngine
from mcore_rl.sockets import Address
from mcore_rl.weight_sync.base import Link
from mcore_rl.workers.roles import EngineProcess, Rollout, handlers
from mcore_rl.workers.rollout_worker import RolloutWorker
from mcore_rl.workers.spec import EngineWorkerSpec, with_found_model


class EngineWorker(EngineProcess):
    """A `launch.serve.Servant`: one engine.

    Args:
        spec: of this process.
        updates: address where it listens for weights.
    """

    def __init__(self, spec: EngineWorkerSpec, updates: Address) -> None:
        engine = with_found_model(spec.engine)
        link = Link(
            transport=engine.config.transport,
            run_folder=engine.run_folder,
            engine=spec.number,
            engine_rank=0,
            num_receivers=engine.config.tensor_model_parallel_size,
        )
        if engine.url:
            self._engine = ServingEngine(ServerEngine(engine, link))
        else:
            self._engine = OwnProcessEngine(engine, link)
        self._rollout = RolloutWorker(engine, self._engine, is_first=True, routes=None)
        self._updates = UpdateListener(updates)
        self.endpoint = self._updates.endpoint

    def receive_weights(self, version: int) -> None:
        """See `EngineProcess`."""
        self._updates.serve(self._engine)

    @property
    def handlers(self) -> Mapping[Callable[..., Any], Callable[..., Any]]:
        """The function that does it here, by method of a role."""
        return handlers({Rollout: self._rollout, EngineProcess: self})

    @property
    def is_busy(self) -> bool:
        """Whether requests are running."""
        return self._engine.is_busy

    def run(self) -> None:
        """Do a step of the engine."""
        self._engine.run()

    def close(self) -> None:
        """Free the engine and its socket."""
        self._rollout.close()
        self._updates.close()
