"""From scored groups to samples that carry an advantage per token.

Pure and on the host; the estimator sees the whole batch of all ranks, so its group and batch
statistics do not depend on any layout.

Shapes: N samples, T tokens of the N samples laid end to end, first tokens and prompts included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mcore_rl.algorithms.advantages.base import ADVANTAGES, AdvantageInputs, AlgorithmConfig
from mcore_rl.metrics import Metrics, masked_max, masked_mean, mean
from mcore_rl.segments import Segments
from mcore_rl.types import Sample, SampleGroup, with_sample_fields


def assign_advantages(
    groups: Sequence[SampleGroup], cfg: AlgorithmConfig
) -> tuple[list[SampleGroup], Metrics]:
    """Return copies of the groups whose samples have `advantages`, and metrics.

    Advantages, and returns where a critic learns, are as long as `token_ids`, 0.0 where `loss_mask`
    is False and on first tokens.
    `advantage/*` are over trained tokens; `reward/zero_std_group_frac` is the share of groups whose
    rewards are all equal, which train nothing.

    Args:
        groups: all groups of the step, rewards final; none empty.
        cfg: the estimator and its options.
    """
    estimator = ADVANTAGES.get(cfg.adv_estimator)
    samples = [sample for group in groups for sample in group.samples]
    group_N = [number for number, group in enumerate(groups) for _ in group.samples]
    inputs = AdvantageInputs(
        rewards_N=torch.tensor([sample.reward for sample in samples], dtype=torch.float64),
        group_N=torch.tensor(group_N, dtype=torch.int64),
        segments=Segments.from_loss_masks([sample.loss_mask for sample in samples]),
        num_response_tokens_N=torch.tensor(
            [sample.num_response_tokens for sample in samples], dtype=torch.float64
        ),
        baseline_N=_baselines(groups) if estimator.needs_greedy_baseline else None,
        values_T=_values(samples) if estimator.needs_critic else None,
    )
    advantages_T = estimator.compute(inputs, cfg.options)
    lengths = [len(sample.loss_mask) for sample in samples]
    assigned = with_sample_fields(groups, advantages=_lists(advantages_T, lengths))
    mask_T, num_groups = inputs.segments.mask_T, len(groups)
    metrics: Metrics = {}
    if estimator.returns is not None:
        returns_T = estimator.returns(inputs, cfg.options)
        assigned = with_sample_fields(assigned, returns=_lists(returns_T, lengths))
        metrics = _value_metrics(inputs, returns_T)
    num_useless = inputs.has_equal_rewards_P.sum()
    return assigned, metrics | {
        "advantage/mean": masked_mean(advantages_T, mask_T),
        "advantage/abs_mean": masked_mean(advantages_T.abs(), mask_T),
        "advantage/max": masked_max(advantages_T, mask_T),
        "reward/zero_std_group_frac": mean(num_useless / max(num_groups, 1), num_groups),
    }


def _lists(x_T: Tensor, lengths: Sequence[int]) -> list[list[float]]:
    """Return the values of each sample."""
    return [piece.tolist() for piece in x_T.split(lengths)]


def _values(samples: Sequence[Sample]) -> Tensor:
    """Return the critic's values of all tokens, [T] float64."""
    return torch.tensor([v for sample in samples for v in sample.values], dtype=torch.float64)


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
