"""Validation: answer the validation prompts, score them, report by data source."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.config.run import RunConfig
from mcore_rl.loop.generate import generate_groups
from mcore_rl.loop.inputs import RunInputs
from mcore_rl.metrics import Metrics, mean, merge
from mcore_rl.observability.samples import SampleLog
from mcore_rl.rewards.score import failure_metrics
from mcore_rl.types import SampleGroup


def evaluate(
    cfg: RunConfig, inputs: RunInputs, cluster: Cluster, step: int, samples: SampleLog
) -> Metrics:
    """Return `eval/<data source>/...` of the weights of `step`, and log some of the samples.

    `accuracy` is the mean score over all samples: the share of right answers where scores are 0 or
    1. With several samples per prompt `best_at_<n>` is the mean over prompts of the best one.
    `<name>/mean` is the mean of a further number of the reward over the samples that have it.
    `failed_frac` and `timeout_frac` are the shares of responses that the reward could not score,
    which count 0 in the accuracy, and `truncated_frac` that of those cut off at the limit.

    Raises:
        UserError: if more rewards failed than `reward.max_failed_frac` allows.
    """
    val = cfg.rollout.val_kwargs
    size = cfg.data.val_batch_size or max(1, len(inputs.val_prompts))
    groups: list[SampleGroup] = []
    for batch in _batches(inputs.val_prompts, size):
        answered = generate_groups(
            cluster,
            batch,
            val.n,
            temperature=val.temperature if val.do_sample else 0.0,
            top_p=val.top_p if val.do_sample else 1.0,
            top_k=val.top_k if val.do_sample else -1,
            max_tokens=cfg.data.max_response_length,
            seed=f"{cfg.data.seed}:val",
        )
        groups += inputs.scorer.score(answered)[0]
    samples.log(step, "val", groups)
    inputs.scorer.check_failures(groups)
    return merge(_group_metrics(group) for group in groups)


def _batches(items: Sequence, size: int):
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _group_metrics(group: SampleGroup) -> Metrics:
    section = f"eval/{group.prompt.data_source}"
    metrics = merge(
        {
            **{f"{section}/{k}/mean": mean(v) for k, v in sample.reward_metrics.items()},
            f"{section}/accuracy": mean(sample.reward),
            f"{section}/response_tokens/mean": mean(sample.num_response_tokens),
            f"{section}/truncated_frac": mean(float(sample.finish_reason == "length")),
        }
        for sample in group.samples
    )
    failures = failure_metrics(group.samples)
    metrics |= {f"{section}/{name}": metric for name, metric in failures.items()}
    if len(group.samples) > 1:
        best = max(sample.reward for sample in group.samples)
        metrics[f"{section}/best_at_{len(group.samples)}"] = mean(best)
    return metrics
