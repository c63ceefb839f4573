"""From the stream of prompts to the scored groups that a step trains on.

With `algorithm.filter_groups` batches of prompts are drawn until enough groups have a learning
signal. All draws of a step happen before its checkpoint, so a resumed run finds the stream where
the step left it. Groups beyond the batch are not kept for the next step: older weights drew them.
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
from mcore_rl.loop.generate import Asked, answered_groups, ask_for_groups, rollout_metrics
from mcore_rl.loop.inputs import RunInputs
from mcore_rl.loop.ledger import Ledger
from mcore_rl.metrics import Metrics, mean, merge, total
from mcore_rl.observability.trackers import RunLog
from mcore_rl.rewards.overlong import penalize_overlong
from mcore_rl.types import Prompt, SampleGroup

logger = logging.getLogger(__name__)

_WARN_EVERY = 10
"""A step warns each time it has drawn so many more batches."""
_MOST_PASSES = 3
"""Passes over the data in one step if no number of batches is set; one if no group was kept."""


class Draws:
    """Lets the engines answer prompts when a step needs them, and counts the samples that come
    back.

    Args:
        cfg: the run.
        inputs: of the run.
        cluster: running workers, their engines at the version of the step that draws.
    """

    def __init__(self, cfg: RunConfig, inputs: RunInputs, cluster: Cluster) -> None:
        self._cfg, self._inputs, self._cluster = cfg, inputs, cluster
        self.batch_size = cfg.data.gen_batch_size or cfg.data.train_batch_size
        """Prompts of a draw."""
        self._enough = cfg.data.train_batch_size if cfg.rollout.stop_stragglers else None
        self.ledger = Ledger()

    def draw(self, step: int, number: int) -> list[SampleGroup]:
        """Return `rollout.n` samples of each of the next prompts.

        Args:
            step: that trains on them.
            number: of the draw within the step, counted from 0. With another number, a prompt that
                comes again within the step gets other samples.
        """
        return self._answered(step, self._ask(step, number, self._next_prompts()), self._enough)

    def baselines(self, step: int, prompts: Sequence[Prompt]) -> list[SampleGroup]:
        """Return one greedy sample of each prompt."""
        groups = self._answered(step, self._ask(step, 0, prompts, greedy=True))
        self.ledger.discarded("baseline", groups)
        return groups

    def _next_prompts(self) -> list[Prompt]:
        return self._inputs.prompts.next(self.batch_size)

    def _ask(
        self, step: int, number: int, prompts: Sequence[Prompt], *, greedy: bool = False
    ) -> Asked:
        cfg = self._cfg
        return ask_for_groups(
            self._cluster,
            prompts,
            1 if greedy else cfg.rollout.n,
            temperature=0.0 if greedy else cfg.rollout.temperature,
            top_p=cfg.rollout.top_p,
            top_k=cfg.rollout.top_k,
            max_tokens=cfg.data.max_response_length,
            seed=f"{cfg.data.seed}:{step}" + f":{number}" * (number > 0),
            keep_routes=self._inputs.routing is not None and not greedy,
        )

    def _answered(self, step: int, asked: Asked, enough: int | None = None) -> list[SampleGroup]:
        groups = answered_groups(self._cluster, asked, enough)
        samples = [sample for group in groups for sample in group.samples]
        versions = {s.weight_version for s in samples if s.num_response_tokens}
        oldest = step - self._cfg.trainer.max_staleness
        assert all(oldest <= v <= step for v in versions), f"step {step}: weights {versions}"
        self.ledger.generated(groups)
        return groups


def collect_groups(
    cfg: RunConfig, inputs: RunInputs, draws: Draws, step: int, log: RunLog
) -> tuple[list[SampleGroup], Metrics]:
    """Return `data.train_batch_size` scored groups of `rollout.n` samples for `step`, and the
    metrics of all that was generated for it.

    Raises:
        UserError: if `algorithm.filter_groups.max_num_gen_batches` batches are not enough or,
            where it is 0, a few passes over the data.
    """
    wanted, filtering = cfg.data.train_batch_size, cfg.algorithm.filter_groups
    kept: list[SampleGroup] = []
    alike: Counter[float] = Counter()
    metrics: list[Metrics] = []
    num_batches = 0
    while len(kept) < wanted:
        _check_progress(cfg, len(inputs.prompts), step, num_batches, len(kept), alike)
        with log.stage("rollout"):
            drawn = draws.draw(step, num_batches)
            if cfg.rollout.stop_stragglers:
                drawn, stopped_metrics = _without_stopped(draws, drawn)
                metrics.append(stopped_metrics)
            metrics.append(rollout_metrics(drawn, step))
        with log.stage("reward"):
            groups, reward_metrics = _score(cfg, inputs, drawn)
            metrics.append(reward_metrics)
        if filtering.enable:
            alike.update(_rewards_of_all(groups))
            scored, groups = groups, informative_groups(groups, filtering.metric)
            informative = {id(group) for group in groups}
            rest = [group for group in scored if id(group) not in informative]
            draws.ledger.discarded("alike", rest)
            metrics.append({"rollout/kept_group_frac": mean(len(groups) / len(drawn), len(drawn))})
        kept += groups
        num_batches += 1
    if filtering.enable:
        metrics.append({"rollout/num_gen_batches": total(num_batches)})
    draws.ledger.discarded("surplus", kept[wanted:])
    kept = kept[:wanted]
    if ADVANTAGES.get(cfg.algorithm.adv_estimator).needs_greedy_baseline:
        kept, baseline_metrics = _with_baselines(cfg, inputs, draws, kept, step, log)
        metrics.append(baseline_metrics)
    return kept, merge(metrics)


def _without_stopped(
    draws: Draws, groups: Sequence[SampleGroup]
) -> tuple[list[SampleGroup], Metrics]:
    """Return the groups that ended, and the share that did not; the others are discarded."""
    is_whole = [all(s.finish_reason != "abort" for s in group.samples) for group in groups]
    pairs = list(zip(groups, is_whole, strict=True))
    draws.ledger.discarded("straggler", [group for group, whole in pairs if not whole])
    share = 1 - sum(is_whole) / len(groups)
    metrics: Metrics = {"rollout/stopped_group_frac": mean(share, len(groups))}
    return [group for group, whole in pairs if whole], metrics


def _check_progress(
    cfg: RunConfig,
    num_prompts: int,
    step: int,
    num_batches: int,
    num_kept: int,
    alike: Counter[float],
) -> None:
    """Raise a UserError with the reason when the step has drawn as many batches as it may."""
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
        "Fix the reward if it never differs; otherwise raise rollout.n, take prompts that are "
        "neither too easy nor too hard, or set the number of batches.",
    )
    if num_batches and num_batches % _WARN_EVERY == 0:
        logger.warning("%d %s", num_batches, reason)


def _rewards_of_all(groups: Sequence[SampleGroup]) -> list[float]:
    """Return the reward of each group whose samples all have the same reward."""
    rewards = [{sample.reward for sample in group.samples} for group in groups]
    return [min(of_group) for of_group in rewards if len(of_group) == 1]


def _most_common(alike: Counter[float]) -> str:
    """Say which rewards are most common among groups whose samples all have the same reward."""
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
    draws: Draws,
    groups: Sequence[SampleGroup],
    step: int,
    log: RunLog,
) -> tuple[list[SampleGroup], Metrics]:
    """Return the groups with the reward of a greedy response as `baseline_reward`."""
    with log.stage("rollout"):
        answered = draws.baselines(step, [group.prompt for group in groups])
    with log.stage("reward"):
        scored, _ = _score(cfg, inputs, answered)
    rewards = [group.samples[0].reward for group in scored]
    metrics = merge({"reward/baseline/mean": mean(reward)} for reward in rewards)
    pairs = zip(groups, rewards, strict=True)
    return [replace(group, baseline_reward=reward) for group, reward in pairs], metrics
