"""What a step does with its scored groups, in every loop.

groups -> log-probabilities -> KL in the reward -> values -> advantages   `Learner.prepare`
       -> updates of the critic and of the actor                          `Learner.update`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mcore_rl.algorithms.advantages import assign_advantages
from mcore_rl.algorithms.kl_in_reward import KlController
from mcore_rl.algorithms.objective import resolve_objective
from mcore_rl.algorithms.objectives import PolicyObjective
from mcore_rl.algorithms.overlong_filtering import without_truncated
from mcore_rl.cluster.cluster import Cluster
from mcore_rl.config.run import RunConfig
from mcore_rl.data.packing import split_minibatches
from mcore_rl.loop.critic import update_critic, with_values
from mcore_rl.metrics import Metrics, merge
from mcore_rl.observability.trackers import RunLog
from mcore_rl.types import SampleGroup, TokenSequence, with_sample_fields


class Learner:
    """Learns from groups, step by step.

    Args:
        cfg: the run.
        cluster: running workers.
    """

    def __init__(self, cfg: RunConfig, cluster: Cluster) -> None:
        self._cfg, self._cluster = cfg, cluster
        self._objective = PolicyObjective(
            resolve_objective(cfg.actor, cfg.data.max_response_length),
            cfg.actor.calculate_entropy,
            cfg.algorithm.rollout_correction,
        )
        self.kl = KlController(cfg.algorithm.kl_ctrl, cfg.algorithm.kl_penalty)
        """The part of the learner that a checkpoint keeps."""

    def prepare(
        self, groups: list[SampleGroup], log: RunLog
    ) -> tuple[list[SampleGroup], list[Metrics]]:
        """Return the groups with all fields that the updates read, and metrics."""
        cfg, cluster = self._cfg, self._cluster
        metrics: list[Metrics] = []
        with log.stage("old_logprobs"):
            groups = with_logprobs(cfg, cluster, self._objective, groups)
        if cfg.algorithm.use_kl_in_reward:
            groups, kl_metrics = self.kl.penalize(groups)
            metrics.append(kl_metrics)
        if cfg.algorithm.overlong_filtering:
            groups = without_truncated(groups)
        groups = with_values(cfg, cluster, groups, log)
        groups, advantage_metrics = assign_advantages(groups, cfg.algorithm)
        return groups, [*metrics, advantage_metrics]

    def update(self, step: int, groups: Sequence[SampleGroup], log: RunLog) -> list[Metrics]:
        """Do the updates of a step, only of the critic while it warms up; return metrics."""
        cfg, cluster = self._cfg, self._cluster
        metrics = [update_critic(cfg, cluster, groups, log)]
        if step >= cfg.trainer.critic_warmup:
            with log.stage("train"):
                metrics.append(update(cfg, cluster, self._objective, groups))
        return metrics


def is_due(step: int, frequency: int) -> bool:
    """Return whether something done every `frequency` steps (-1: never) is due at `step`."""
    return frequency > 0 and step % frequency == 0


def is_validated(cfg: RunConfig, step: int) -> bool:
    """Return whether a step begins with a validation."""
    trainer = cfg.trainer
    return trainer.val_before_train if step == 0 else is_due(step, trainer.test_freq)


def with_logprobs(
    cfg: RunConfig, cluster: Cluster, objective: PolicyObjective, groups: list[SampleGroup]
) -> list[SampleGroup]:
    """Return the groups with `old_logprobs` and `ref_logprobs`, as far as the losses need them.

    A step of one update needs no pass for the old ones: they are those of its own forward. With
    router replay R2 that pass also records the experts that the updates replay.
    """
    in_reward = cfg.algorithm.use_kl_in_reward
    minibatches = sequences_of_updates(cfg, groups)
    several = len(minibatches) * cfg.actor.ppo_epochs > 1
    found: dict[str, Sequence[Any]] = {}
    if cfg.actor.router_replay.mode == "R2":
        recorded = cluster.trainer.record_logprobs(*minibatches)
        found["old_logprobs"], found["routed_experts"] = zip(*recorded, strict=True)
    elif in_reward or (several and objective.needs_old_logprobs):
        found["old_logprobs"] = cluster.trainer.logprobs(*minibatches)
    if cfg.needs_reference:
        found["ref_logprobs"] = cluster.trainer.ref_logprobs(*minibatches)
    return with_sample_fields(groups, **found) if found else groups


def update(
    cfg: RunConfig, cluster: Cluster, objective: PolicyObjective, groups: Sequence[SampleGroup]
) -> Metrics:
    """Do the optimizer updates of a step and return their metrics."""
    cluster.trainer.begin_step()
    parts = []
    for _ in range(cfg.actor.ppo_epochs):
        for sequences in sequences_of_updates(cfg, groups):
            if parts and sequences[0].old_logprobs is None:
                # The weights have changed: their difference from the engine's is no longer a
                # mismatch.
                sequences = [replace(sequence, rollout_logprobs=None) for sequence in sequences]
            parts.append(cluster.trainer.update(sequences, objective))
    return merge(parts)


def sequences_of_updates(
    cfg: RunConfig, groups: Sequence[SampleGroup]
) -> list[list[TokenSequence]]:
    """Return the sequences of each update of an epoch."""
    return [
        [sample.to_sequence() for group in minibatch for sample in group.samples]
        for minibatch in split_minibatches(groups, cfg.actor.ppo_mini_batch_size)
    ]
