"""The controller's view of all workers: verbs for the loop, on top of a `WorkerGroup`.

Two launchers give the same `WorkerGroup`: call a method on every worker, with common or per-rank
arguments, and get the results by rank. `Cluster` turns sequences into micro-batches for the
data-parallel ranks, requests into shares for the engines, and puts results back in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mcore_rl.data.packing import Cut, packing_metrics, plan_minibatch
from mcore_rl.errors import CheckpointError
from mcore_rl.metrics import Metrics, merge, of_one_update
from mcore_rl.rollout.base import GenerationRequest, GenerationResult
from mcore_rl.types import Layout, MinibatchPlan, Place, TokenSequence, WriteState


class WorkerGroup(Protocol):
    """All workers of a run."""

    world_size: int
    step: int | None
    """Step of the loop, for the messages of failures; the loop sets it."""

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call `method` with the same arguments on every worker; return results by rank."""
        ...

    def call_each(self, method: str, args_of_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call `method` on every worker with its own arguments; return results by rank."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...


class Cluster:
    """What the loops ask for.

    Args:
        workers: running workers.
        layout: the parallel layout of the actor, and of the critic.
        cut: how a minibatch of the actor is cut into micro-batches.
        critic_cut: the same of the critic; None: there is none.
    """

    def __init__(
        self, workers: WorkerGroup, layout: Layout, cut: Cut, critic_cut: Cut | None = None
    ) -> None:
        self.layout = layout
        self._cuts = {"actor": cut} | ({"critic": critic_cut} if critic_cut else {})
        self._workers = workers
        self._places: list[Place] = workers.call("place")
        self._ranks_of_engine: dict[int, list[int]] = {}
        for rank, place in enumerate(self._places):
            if place.engine is not None:
                self._ranks_of_engine.setdefault(place.engine, []).append(rank)

    def enter_step(self, step: int) -> None:
        """Have failures from here on name `step`."""
        self._workers.step = step

    @property
    def num_engines(self) -> int:
        return len(self._ranks_of_engine)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Return one result per request, in order, generated on all engines.

        Requests are dealt out one by one, so that neighbours (samples of one prompt, likely of
        like length) spread over the engines. All ranks of an engine get the same.
        """
        engines = list(self._ranks_of_engine.values())
        shares: list[Sequence[GenerationRequest]] = [()] * len(self._places)
        for number, ranks in enumerate(engines):
            for rank in ranks:
                shares[rank] = requests[number :: len(engines)]
        by_rank = self._workers.call_each("generate", [(share,) for share in shares])
        answers = [iter(by_rank[ranks[0]]) for ranks in engines]
        return [next(answers[number % len(engines)]) for number in range(len(requests))]

    def sync_weights(self, version: int) -> Metrics:
        """Give every engine the actor's weights as `version`."""
        return merge(self._workers.call("sync_weights", version))

    def logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        """Return logprobs of every trained token under the current weights, by sequence."""
        return self._forward("actor.logprobs", sequences)

    def record_logprobs(
        self, sequences: Sequence[TokenSequence]
    ) -> list[tuple[list[float], np.ndarray]]:
        """Return logprobs as `logprobs` does, and the experts of every token, by sequence."""
        return self._forward("actor.record_logprobs", sequences)

    def ref_logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        """Return logprobs of every trained token under the reference weights, by sequence."""
        return self._forward("actor.ref_logprobs", sequences)

    def layer_outputs(self, sequences: Sequence[TokenSequence]) -> list[dict[str, np.ndarray]]:
        """Return what comes out of embedding, layers and final norm for each sequence.

        Returns:
            By the name of the module in Hugging Face's model: [tokens - 1, H] float32.
        """
        plan = self._plan("actor", sequences)
        by_rank = self._workers.call_each("actor.layer_outputs", self._shares(plan))
        found: list[dict[str, np.ndarray]] = [{} for _ in sequences]
        for result in by_rank:  # each stage has layers of its own
            for index, outputs in result.items():
                found[index] |= outputs
        return found

    def values(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        """Return the critic's value of every trained token, by sequence."""
        return self._forward("critic.values", sequences)

    def _forward(self, method: str, sequences: Sequence[TokenSequence]) -> list[Any]:
        plan = self._plan(method.split(".")[0], sequences)
        by_rank = self._workers.call_each(method, self._shares(plan))
        found: dict[int, Any] = {}
        for result in by_rank:
            found |= result
        return [found[index] for index in range(len(sequences))]

    def begin_step(self, role: str = "actor") -> None:
        """Move the learning-rate schedule of actor or critic to the coming step."""
        self._workers.call(f"{role}.begin_step")

    def update(self, sequences: Sequence[TokenSequence], objective: Any) -> Metrics:
        """Do one optimizer update of the actor on a minibatch of sequences; return its metrics."""
        plan = self._plan("actor", sequences)
        return merge(
            [self._update("actor", plan, objective), packing_metrics(plan, self._cuts["actor"])]
        )

    def update_critic(self, sequences: Sequence[TokenSequence], objective: Any) -> Metrics:
        """Do one optimizer update of the critic on a minibatch of sequences; return its metrics."""
        return self._update("critic", self._plan("critic", sequences), objective)

    def _update(self, role: str, plan: MinibatchPlan, objective: Any) -> Metrics:
        shares = [(*share, plan.denominators, objective) for share in self._shares(plan)]
        return of_one_update(merge(self._workers.call_each(f"{role}.update", shares)))

    def begin_save(self, folder: str) -> None:
        """Begin to write the training state of actor and critic into folders of their names.

        Training may go on; what is written is the state of now. One at a time.

        Args:
            folder: exists, without them, and is seen by every rank.
        """
        for role in self._cuts:
            of_role = Path(folder) / role
            of_role.mkdir(exist_ok=True)
            self._workers.call(f"{role}.begin_save", str(of_role))

    def end_save(self, *, wait: bool) -> bool:
        """Complete what `begin_save` began if every rank has written its part.

        Args:
            wait: until they have.

        Returns:
            Whether it is complete; if not, ask again.

        Raises:
            CheckpointError: if a rank cannot write, with that rank.
        """
        for role in self._cuts:
            states: list[WriteState] = self._workers.call(f"{role}.save_state", wait)
            for rank, state in enumerate(states):
                if state.problem:
                    raise CheckpointError(
                        state.problem,
                        rank=rank,
                        role=f"worker, {role}.save",
                        step=self._workers.step,
                    )
            if not all(state.is_done for state in states):
                return False
        for role in self._cuts:
            self._workers.call(f"{role}.finish_save")
        return True

    def load(self, folder: str) -> None:
        """Read back what was saved into `folder`."""
        for role in self._cuts:
            self._workers.call(f"{role}.load", str(Path(folder) / role))

    def export_hf(self, folder: str) -> None:
        """Write the actor's weights as a Hugging Face folder."""
        self._workers.call("actor.export_hf", folder)

    def close(self) -> None:
        """End all workers."""
        self._workers.close()

    def _plan(self, role: str, sequences: Sequence[TokenSequence]) -> MinibatchPlan:
        multiple_of = self.layout.micro_batch_multiple
        cut = self._cuts[role]
        return plan_minibatch(sequences, self.layout.dp, cut, multiple_of=multiple_of)

    def _shares(self, plan: MinibatchPlan) -> list[tuple[Any, ...]]:
        return [(plan.micro_batches[place.dp_rank],) for place in self._places]
