"""From the stream of prompts to the scored groups that a step trains on.

With `algorithm.filter_groups` batches of prompts are drawn until enough groups teach something.
All draws of a step happen before its checkpoint, so a resumed run finds the stream where the step
left it. Groups beyond the batch are not kept for the next step, whose weights did not make them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from mcore_rl.algorithms.advantages import ADVANTAGES
from mcore_rl.algorithms.filter_groups import informative_groups
from mcore_rl.cluster.cluster import Cluster
from mcore_rl.config.run import RunConfig
from mcore_rl.errors import require
from mcore_rl.loop.generate import generate_groups, rollout_metrics
from mcore_rl.loop.inputs import RunInputs
from mcore_rl.metrics import Metrics, mean, merge, total
from mcore_rl.observability.trackers import RunLog
from mcore_rl.rewards.overlong import penalize_overlong
from mcore_rl.types import Prompt, SampleGroup

logger = logging.getLogger(__name__)

_WARN_EVERY = 10
"""Batches of one step."""
_MOST_PASSES = 3
"""Over the data in one step, where no number of batches is set; one if it gave no group at all."""


def collect_groups(
    cfg: RunConfig, inputs: RunInputs, cluster: Cluster, step: int, log: RunLog
) -> tuple[list[SampleGroup], Metrics]:
    """Return `data.train_batch_size` scored groups of `rollout.n` samples, drawn with the weights
    of `step`, and the metrics of all that was generated.

    Raises:
        UserError: if `algorithm.filter_groups.max_num_gen_batches` batches are not enough or,
            where it is 0, a few passes over the data.
    """
    wanted, filtering = cfg.data.train_batch_size, cfg.algorithm.filter_groups
    batch_size = cfg.data.gen_batch_size or wanted
    kept: list[SampleGroup] = []
    alike: Counter[float] = Counter()
    metrics: list[Metrics] = []
    num_batches = 0
    while len(kept) < wanted:
        _check_progress(cfg, len(inputs.prompts), step, num_batches, len(kept), alike)
        prompts = inputs.prompts.next(batch_size)
        with log.stage("rollout"):
            # A prompt may come again within the step, and is to be answered anew.
            groups = generate(cfg, inputs, cluster, prompts, step, draw=num_batches)
            metrics.append(rollout_metrics(groups, step))
        with log.stage("reward"):
            groups, reward_metrics = _score(cfg, inputs, groups)
            metrics.append(reward_metrics)
        if filtering.enable:
            alike.update(_rewards_of_all(groups))
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
        keep_routes=inputs.routing is not None and not greedy,
    )
    versions = {sample.weight_version for group in groups for sample in group.samples}
    assert versions == {step}, f"weights of versions {versions} answered in step {step}"
    return groups


def _check_progress(
    cfg: RunConfig,
    num_prompts: int,
    step: int,
    num_batches: int,
    num_kept: int,
    alike: Counter[float],
) -> None:
    """Raise a UserError when the step has drawn as many batches as it may, and gives the reason."""
    wanted, limit = cfg.data.train_batch_size, cfg.algorithm.filter_groups.max_num_gen_batches
    num_drawn = num_batches * (cfg.data.gen_batch_size or wanted)
    rule = f"batches of step {step} gave {num_kept} of {wanted} groups whose samples differ"
    reason = f"{rule}; {_most_common(alike)}"
    fix = "Raise it, raise rollout.n, or take prompts that are neither too easy nor too hard."
    key = "algorithm.filter_groups.max_num_gen_batches"
    require(limit == 0 or num_batches < limit, key, limit, reason, fix)
    most = _MOST_PASSES if num_kept else 1
    passes = f"{most} {'passes' if most > 1 else 'pass'} over the {num_prompts} prompts"
    require(
        limit > 0 or num_drawn < most * num_prompts,
        key,
        limit,
        f"lets a step draw {passes}, and the {num_batches} {reason}",
        "Mend the reward if it never differs; otherwise raise rollout.n, take prompts that are "
        "neither too easy nor too hard, or set the number of batches.",
    )
    if num_batches and num_batches % _WARN_EVERY == 0:
        logger.warning("%d %s", num_batches, reason)


def _rewards_of_all(groups: Sequence[SampleGroup]) -> list[float]:
    """Return the reward of each group whose samples all have the same."""
    rewards = [{sample.reward for sample in group.samples} for group in groups]
    return [min(of_group) for of_group in rewards if len(of_group) == 1]


def _most_common(alike: Counter[float]) -> str:
    """Say which rewards groups have whose samples are alike."""
    if not alike:
        return "the rewards differ in every group"
    counts = [f"{num} groups only {reward:g}" for reward, num in alike.most_common(3)]
    return f"of the rewards, {', '.join(counts)}"


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
