"""From the stream of prompts to the scored groups that a step trains on.

With `algorithm.filter_groups` batches of prompts are drawn until enough groups teach something.
All draws of a step happen before its checkpoint, so a resumed run finds the stream where the step
left it. Groups beyond the batch are not kept for the next step, whose weights did not make them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from mcore_rl.algorithms.advantages import ADVANTAGES
from mcore_rl.algorithms.filter_groups import informative_groups
from mcore_rl.cluster.cluster import Cluster
from mcore_rl.config.run import RunConfig
from mcore_rl.errors import require
from mcore_rl.loop.generate import generate_groups, rollout_metrics
from mcore_rl.loop.inputs import RunInputs
from mcore_rl.loop.routes import check_route_shapes
from mcore_rl.metrics import Metrics, mean, merge, total
from mcore_rl.observability.trackers import RunLog
from mcore_rl.rewards.overlong import penalize_overlong
from mcore_rl.types import Prompt, SampleGroup

logger = logging.getLogger(__name__)

_WARN_EVERY = 10
"""Batches of one step."""


def collect_groups(
    cfg: RunConfig, inputs: RunInputs, cluster: Cluster, step: int, log: RunLog
) -> tuple[list[SampleGroup], Metrics]:
    """Return `data.train_batch_size` scored groups of `rollout.n` samples, drawn with the weights
    of `step`, and the metrics of all that was generated.

    Raises:
        UserError: if `algorithm.filter_groups.max_num_gen_batches` batches are not enough.
    """
    wanted, filtering = cfg.data.train_batch_size, cfg.algorithm.filter_groups
    batch_size = cfg.data.gen_batch_size or wanted
    kept: list[SampleGroup] = []
    metrics: list[Metrics] = []
    num_batches = 0
    while len(kept) < wanted:
        _check_progress(num_batches, len(kept), cfg, step)
        prompts = inputs.prompts.next(batch_size)
        with log.stage("rollout"):
            # A prompt may come again within the step, and is to be answered anew.
            groups = generate(cfg, inputs, cluster, prompts, step, draw=num_batches)
            metrics.append(rollout_metrics(groups, step))
        with log.stage("reward"):
            groups, reward_metrics = _score(cfg, inputs, groups)
            metrics.append(reward_metrics)
        if filtering.enable:
            groups = informative_groups(groups, filtering.metric)
            metrics.append({"rollout/kept_group_frac": mean(len(groups) / batch_size, batch_size)})
        kept += groups
        num_batches += 1
    if filtering.enable:
        metrics.append({"rollout/num_gen_batches": total(num_batches)})
    kept = kept[:wanted]
    if ADVANTAGES.get(cfg.algorithm.adv_estimator).needs_greedy_baseline:
        kept, baseline_metrics = _with_baselines(cfg, inputs, cluster, kept, step, log)
        metrics.append(baseline_metrics)
    return kept, merge(metrics)


def generate(
    cfg: RunConfig,
    inputs: RunInputs,
    cluster: Cluster,
    prompts: Sequence[Prompt],
    step: int,
    *,
    draw: int = 0,
    greedy: bool = False,
) -> list[SampleGroup]:
    """Return `rollout.n` samples of each prompt, drawn with the weights of `step`.

    Args:
        cfg: the run.
        inputs: of the run.
        cluster: running workers, their engines at version `step`.
        prompts: what to answer.
        step: of the loop.
        draw: number of the call within the step; another one draws other samples.
        greedy: return one greedy sample of each prompt instead.
    """
    groups = generate_groups(
        cluster,
        prompts,
        1 if greedy else cfg.rollout.n,
        temperature=0.0 if greedy else cfg.rollout.temperature,
        top_p=cfg.rollout.top_p,
        top_k=cfg.rollout.top_k,
        max_tokens=cfg.data.max_response_length,
        seed=f"{cfg.data.seed}:{step}" + f":{draw}" * (draw > 0),
        tokenizer=inputs.tokenizer,
    )
    versions = {sample.weight_version for group in groups for sample in group.samples}
    assert versions == {step}, f"weights of versions {versions} answered in step {step}"
    if inputs.routing is not None:
        check_route_shapes(groups, inputs.routing, step)
    return groups


def _check_progress(num_batches: int, num_kept: int, cfg: RunConfig, step: int) -> None:
    wanted, limit = cfg.data.train_batch_size, cfg.algorithm.filter_groups.max_num_gen_batches
    require(
        limit == 0 or num_batches < limit,
        "algorithm.filter_groups.max_num_gen_batches",
        limit,
        f"batches of step {step} gave {num_kept} of {wanted} groups whose samples differ",
        "Raise it, raise rollout.n, or take prompts that are neither too easy nor too hard.",
    )
    if num_batches and num_batches % _WARN_EVERY == 0:
        logger.warning("%d batches gave %d of %d groups", num_batches, num_kept, wanted)


def _score(
    cfg: RunConfig, inputs: RunInputs, groups: Sequence[SampleGroup]
) -> tuple[list[SampleGroup], Metrics]:
    scored, metrics = inputs.scorer.score(groups)
    if not cfg.reward.overlong_buffer.enable:
        return scored, metrics
    penalized, penalty_metrics = penalize_overlong(
        scored, cfg.reward.overlong_buffer, cfg.data.max_response_length
    )
    return penalized, metrics | penalty_metrics


def _with_baselines(
    cfg: RunConfig,
    inputs: RunInputs,
    cluster: Cluster,
    groups: Sequence[SampleGroup],
    step: int,
    log: RunLog,
) -> tuple[list[SampleGroup], Metrics]:
    """Return the groups with the reward of a greedy response as `baseline_reward`."""
    with log.stage("rollout"):
        prompts = [group.prompt for group in groups]
        answered = generate(cfg, inputs, cluster, prompts, step, greedy=True)
    with log.stage("reward"):
        scored, _ = _score(cfg, inputs, answered)
    rewards = [group.samples[0].reward for group in scored]
    metrics = merge({"reward/baseline/mean": mean(reward)} for reward in rewards)
    pairs = zip(groups, rewards, strict=True)
    return [replace(group, baseline_reward=reward) for group, reward in pairs], metrics
