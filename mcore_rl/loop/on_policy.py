"""On-policy training: one rollout, its updates, one weight sync, again.

This is the page to read first. A step takes prompts, lets the engines answer them with the weights
of version `step`, scores the answers, turns scores into advantages, trains on them in minibatches,
and gives the engines the new weights as version `step + 1`. What is logged as step s describes
weights s: the validation of s, the samples drawn with s, and the update that led from s to s + 1.
The last validation is logged as one more step, without an update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mcore_rl.algorithms.advantages import assign_advantages
from mcore_rl.algorithms.kl_in_reward import KlController
from mcore_rl.algorithms.objective import resolve_objective
from mcore_rl.algorithms.objectives import PolicyObjective
from mcore_rl.algorithms.overlong_filtering import without_truncated
from mcore_rl.cluster.cluster import Cluster
from mcore_rl.config.run import RunConfig
from mcore_rl.data.packing import split_minibatches
from mcore_rl.loop.agreement import bring_weights
from mcore_rl.loop.checkpoints import Checkpoints
from mcore_rl.loop.collect import collect_groups
from mcore_rl.loop.critic import update_critic, with_values
from mcore_rl.loop.evaluate import evaluate
from mcore_rl.loop.inputs import RunInputs
from mcore_rl.loop.log import open_log, with_times
from mcore_rl.loop.stop import Stop
from mcore_rl.metrics import Metrics, merge
from mcore_rl.observability.samples import SampleLog
from mcore_rl.types import SampleGroup, TokenSequence, with_sample_fields


def train(cfg: RunConfig, inputs: RunInputs, cluster: Cluster, run_dir: Path, stop: Stop) -> None:
    """Train to the last step or, by StoppedError, until asked to end; from the run folder's latest
    checkpoint if it has one."""
    trainer, total_steps = cfg.trainer, inputs.total_steps
    objective = PolicyObjective(
        resolve_objective(cfg.actor, cfg.data.max_response_length),
        cfg.actor.calculate_entropy,
        cfg.algorithm.rollout_correction,
    )
    kl = KlController(cfg.algorithm.kl_ctrl, cfg.algorithm.kl_penalty)
    kept = {"prompts": inputs.prompts, "kl": kl}
    checkpoints = Checkpoints(trainer, run_dir, cluster, kept)
    start = checkpoints.resume()
    samples = SampleLog(run_dir, start, trainer.log_val_generations)

    bring_weights(cfg, inputs, cluster, start)

    with open_log(trainer, run_dir, start, total_steps) as log, stop.saves(checkpoints):
        for step in range(start, total_steps):
            cluster.enter_step(step)
            checkpoints.begin_step(step)
            stop.check()
            metrics: list[Metrics] = []
            if trainer.val_before_train if step == 0 else is_due(step, trainer.test_freq):
                with log.stage("eval"):
                    metrics.append(evaluate(cfg, inputs, cluster, step, samples))
            groups, rollout_metrics = collect_groups(cfg, inputs, cluster, step, log)
            samples.log(step, "train", groups)
            metrics.append(rollout_metrics)
            with log.stage("old_logprobs"):
                groups = with_logprobs(cfg, cluster, objective, groups)
            if cfg.algorithm.use_kl_in_reward:
                groups, kl_metrics = kl.penalize(groups)
                metrics.append(kl_metrics)
            if cfg.algorithm.overlong_filtering:
                groups = without_truncated(groups)
            groups = with_values(cfg, cluster, groups, log)
            groups, advantage_metrics = assign_advantages(groups, cfg.algorithm)
            metrics.append(advantage_metrics)
            stop.check()
            checkpoints.begin_updates()  # from here on the step is finished
            metrics.append(update_critic(cfg, cluster, groups, log))
            if step >= trainer.critic_warmup:
                with log.stage("train"):
                    metrics.append(update(cfg, cluster, objective, groups))
            with log.stage("weight_sync"):
                metrics.append(cluster.engines.sync_weights(version=step + 1))
            log.log(step, with_times(merge(metrics), log.times()))
            # After the log line, which a resumed run does not write again; so the time that this
            # takes is that of the next step.
            is_last = step + 1 == total_steps or stop.is_asked
            if is_last or is_due(step + 1, trainer.save_freq):
                with log.stage("checkpoint"):
                    checkpoints.save(step + 1)

        if inputs.val_prompts:
            with log.stage("eval"):
                eval_metrics = evaluate(cfg, inputs, cluster, total_steps, samples)
            log.log(total_steps, merge([eval_metrics, log.times()]))
        checkpoints.finish()


def is_due(step: int, frequency: int) -> bool:
    return frequency > 0 and step % frequency == 0


def with_logprobs(
    cfg: RunConfig, cluster: Cluster, objective: PolicyObjective, groups: list[SampleGroup]
) -> list[SampleGroup]:
    """Return the groups with what the losses need of `old_logprobs` and `ref_logprobs`.

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
                # The weights have moved: their distance from the engine's is no longer a mismatch.
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
