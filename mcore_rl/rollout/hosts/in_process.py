"""An engine in the process of a train worker, without effect on the worker's global state.

An engine's library may seed and consume the global random states and replace
`torch.set_num_threads`, as vLLM does; both are put back.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import numpy as np
import torch

from mcore_rl.rollout import load_engine
from mcore_rl.rollout.base import EngineSpec, GenerationRequest, GenerationResult
from mcore_rl.rollout.serving import ServingEngine
from mcore_rl.weight_sync.base import Link


class InProcessEngine(ServingEngine):
    """See `ServingEngine`; all ranks of the engine do the same calls.

    Args:
        spec: what the engine starts from.
        link: brings its weights.
    """

    def __init__(self, spec: EngineSpec, link: Link) -> None:
        with _process_state_kept():
            super().__init__(load_engine(spec, link))

    def submit(
        self, groups: Sequence[Sequence[GenerationRequest]]
    ) -> list[Future[list[GenerationResult]]]:
        """Return futures that are done: between two calls a train worker computes nothing."""
        self._refuse_if(self._is_paused, "generate", "is paused")
        with _process_state_kept():
            futures = super().submit(groups)
            while not all(future.done() for future in futures):
                self.run()
        return futures


@contextlib.contextmanager
def _process_state_kept() -> Iterator[None]:
    """Put back the global random states and the thread setter."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    torch_state, set_num_threads = torch.get_rng_state(), torch.set_num_threads
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        torch.set_num_threads = set_num_threads
