"""The critic's part of a step: values before the advantages, updates after them.

Without a critic both do nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from mcore_rl.algorithms.objectives import CriticObjective
from mcore_rl.cluster.cluster import Cluster
from mcore_rl.config.run import RunConfig
from mcore_rl.data.packing import split_minibatches
from mcore_rl.metrics import Metrics, merge
from mcore_rl.observability.trackers import RunLog
from mcore_rl.types import Sample, SampleGroup, TokenSequence, with_sample_fields


def with_values(
    cfg: RunConfig, cluster: Cluster, groups: Sequence[SampleGroup], log: RunLog
) -> list[SampleGroup]:
    """Return the groups with the critic's `values` of their samples."""
    if not cfg.has_critic:
        return list(groups)
    sequences = [_sequence(sample) for group in groups for sample in group.samples]
    with log.stage("values"):
        values = cluster.trainer.values(sequences)
    return with_sample_fields(groups, values=values)


def update_critic(
    cfg: RunConfig, cluster: Cluster, groups: Sequence[SampleGroup], log: RunLog
) -> Metrics:
    """Do the critic's updates of a step and return their metrics."""
    if not cfg.has_critic:
        return {}
    objective = CriticObjective(
        cliprange_value=cfg.critic.cliprange_value,
        agg_mode=cfg.critic.loss_agg_mode,
        loss_scale_factor=float(cfg.data.max_response_length),
    )
    num_epochs = cfg.critic.ppo_epochs or cfg.actor.ppo_epochs
    size = cfg.critic.ppo_mini_batch_size or cfg.actor.ppo_mini_batch_size
    parts = []
    with log.stage("train_critic"):
        cluster.trainer.begin_critic_step()
        for minibatch in split_minibatches(groups, size) * num_epochs:
            sequences = [_sequence(sample) for group in minibatch for sample in group.samples]
            parts.append(cluster.trainer.update_critic(sequences, objective))
    return merge(parts)


def _sequence(sample: Sample) -> TokenSequence:
    """Return what the critic reads of a sample."""
    return TokenSequence(
        token_ids=sample.token_ids,
        loss_mask=sample.loss_mask,
        values=sample.values,
        returns=sample.returns,
    )
