"""From scored groups to samples that carry an advantage per token.

Pure and on the host; the estimator sees the whole batch of all ranks, so its group and batch
statistics do not depend on any layout.

Shapes: N samples, T tokens of the N samples laid end to end, first tokens and prompts included.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mcore_rl.algorithms.advantages.base import (
    ADVANTAGES,
    AdvantageEstimator,
    AdvantageInputs,
    AlgorithmConfig,
)
from mcore_rl.lazy_torch import torch
from mcore_rl.metrics import Metrics, masked_mean, masked_sizes, mean
from mcore_rl.segments import HostSegments, end_to_end
from mcore_rl.types import Numbers, SampleGroup, with_sample_fields

if TYPE_CHECKING:
    from torch import Tensor


def assign_advantages(
    groups: Sequence[SampleGroup], cfg: AlgorithmConfig
) -> tuple[list[SampleGroup], Metrics]:
    """Return copies of the groups whose samples have `advantages`, and metrics.

    Advantages, and returns where a critic learns, are 0.0 where `loss_mask` is False and on first
    tokens. They are computed in float64 and kept in float32.
    `advantage/*` are over trained tokens; `reward/zero_std_group_frac` is the share of groups whose
    rewards are all equal, which train nothing.

    Args:
        groups: all groups of the step, rewards final; none empty.
        cfg: the estimator and its options.
    """
    estimator = ADVANTAGES.get(cfg.adv_estimator)
    inputs = advantage_inputs(groups, estimator)
    advantages_T = estimator.compute(inputs, cfg.options).float()
    lengths = [len(sample.token_ids) for group in groups for sample in group.samples]
    fields = {"advantages": _arrays(advantages_T, lengths)}
    mask_T, num_groups = inputs.segments.mask_T, len(groups)
    metrics: Metrics = {}
    if estimator.returns is not None:
        returns_T = estimator.returns(inputs, cfg.options)
        fields["returns"] = _arrays(returns_T.float(), lengths)
        metrics = _value_metrics(inputs, returns_T)
    num_useless = inputs.has_equal_rewards_P.sum()
    return with_sample_fields(groups, **fields), metrics | {
        **masked_sizes("advantage", advantages_T, mask_T),
        "reward/zero_std_group_frac": mean(num_useless / max(num_groups, 1), num_groups),
    }


def advantage_inputs(
    groups: Sequence[SampleGroup], estimator: AdvantageEstimator
) -> AdvantageInputs:
    """Return what `estimator` reads of the samples of the groups."""
    samples = [sample for group in groups for sample in group.samples]
    group_N = [number for number, group in enumerate(groups) for _ in group.samples]
    return AdvantageInputs(
        rewards_N=torch.tensor([sample.reward for sample in samples], dtype=torch.float64),
        group_N=torch.tensor(group_N, dtype=torch.int64),
        segments=HostSegments.from_loss_masks([sample.loss_mask for sample in samples]),
        num_response_tokens_N=torch.tensor(
            [sample.num_response_tokens for sample in samples], dtype=torch.float64
        ),
        baseline_N=_baselines(groups) if estimator.needs_greedy_baseline else None,
        values_T=end_to_end([s.values for s in samples]) if estimator.needs_critic else None,
    )


def _arrays(x_T: Tensor, lengths: Sequence[int]) -> list[Numbers]:
    """Return the values of each sample."""
    x, stops = x_T.numpy(), itertools.accumulate(lengths)
    return [x[stop - length : stop] for stop, length in zip(stops, lengths, strict=True)]


def _value_metrics(inputs: AdvantageInputs, returns_T: Tensor) -> Metrics:
    """Return how far the critic's values explain the returns: 1 all of it, 0 no more than a
    constant does; left out where all returns are equal."""
    assert inputs.values_T is not None
    mask_T = inputs.segments.mask_T
    values, returns = inputs.values_T[mask_T], returns_T[mask_T]
    metrics: Metrics = {
        "critic/values/mean": masked_mean(inputs.values_T, mask_T),
        "critic/returns/mean": masked_mean(returns_T, mask_T),
    }
    if len(returns) > 1 and returns.min() < returns.max():
        unexplained = (returns - values).var() / returns.var()
        metrics["critic/explained_variance"] = mean(1 - unexplained)
    return metrics


def _baselines(groups: Sequence[SampleGroup]) -> Tensor:
    """Return the greedy response's reward of each sample's prompt, [N] float64."""
    rewards = [group.baseline_reward for group in groups for _ in group.samples]
    return torch.tensor(rewards, dtype=torch.float64)
