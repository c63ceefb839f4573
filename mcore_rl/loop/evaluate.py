"""Validation: answer the validation prompts, score them, report by data source."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.config.run import RunConfig
from mcore_rl.loop.generate import answered_groups, ask_for_groups
from mcore_rl.loop.inputs import RunInputs
from mcore_rl.metrics import Metrics, mean, merge
from mcore_rl.observability.samples import SampleLog
from mcore_rl.rewards.at_k import best_at, majority_at, sizes
from mcore_rl.rewards.score import failure_metrics
from mcore_rl.types import Sample, SampleGroup


def evaluate(
    cfg: RunConfig, inputs: RunInputs, cluster: Cluster, step: int, samples: SampleLog
) -> Metrics:
    """Return `eval/<data source>/...` of the weights of `step`; see `validation_metrics`.

    Raises:
        UserError: if more rewards failed than `reward.max_failed_frac` allows.
    """
    return merge(validation_metrics(validation_groups(cfg, inputs, cluster, step, samples)))


def validation_groups(
    cfg: RunConfig, inputs: RunInputs, cluster: Cluster, step: int, samples: SampleLog
) -> list[SampleGroup]:
    """Return `rollout.val_kwargs.n` scored samples of every validation prompt, drawn with the
    weights of `step`, and log some of them.

    Raises:
        UserError: if more rewards failed than `reward.max_failed_frac` allows.
    """
    val = cfg.rollout.val_kwargs
    size = cfg.data.val_batch_size or max(1, len(inputs.val_prompts))
    groups: list[SampleGroup] = []
    for batch in _batches(inputs.val_prompts, size):
        asked = ask_for_groups(
            cluster,
            batch,
            val.n,
            temperature=val.temperature if val.do_sample else 0.0,
            top_p=val.top_p if val.do_sample else 1.0,
            top_k=val.top_k if val.do_sample else -1,
            max_tokens=cfg.data.max_response_length,
            seed=f"{cfg.data.seed}:val",
        )
        groups += inputs.scorer.score(answered_groups(cluster, asked))[0]
    samples.log(step, "val", groups)
    inputs.scorer.check_failures(groups)
    return groups


def _batches(items: Sequence, size: int):
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def validation_metrics(groups: Sequence[SampleGroup]) -> list[Metrics]:
    """Return the metrics of each group, under `eval/<data source>/`; merged they are those of all.

    `accuracy` is the mean score over all samples: the share of right answers where scores are 0 or
    1. `<name>/mean` is the mean of a further number of the reward over the samples that have it.
    `failed_frac` and `timeout_frac` are the shares of responses that the reward could not score,
    which count 0 in the accuracy, and `truncated_frac` that of those cut off at the limit.

    With several samples per prompt, n, there are also these metrics of k of the n samples, for k =
    1, 2, 4, ... and n, as means over prompts (`rewards/at_k.py`):

    - `best_at_<k>`: the best score.
    - `maj_at_<k>`: the score of the most frequent answer; absent if the reward gives no answers.
    - `pass_at_<k>`: the probability that any is right, by the reward's `acc`, or the score if there
      is none; absent if these are not all 0 or 1.

    and `accuracy/std`, the standard deviation of the scores of a prompt's samples.

    Args:
        groups: scored, all of one size.
    """
    found = [_group_metrics(group) for group in groups]
    for source, of_source in positions_by_source(groups).items():
        for name, values in _of_several_samples([groups[i] for i in of_source]).items():
            for i, value in zip(of_source, values.tolist(), strict=True):
                found[i][f"eval/{source}/{name}"] = mean(value)
    return found


def positions_by_source(groups: Sequence[SampleGroup]) -> dict[str, list[int]]:
    """Return the positions of the groups of each data source."""
    found: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        found.setdefault(group.prompt.data_source, []).append(i)
    return found


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
    return metrics | {f"{section}/{name}": metric for name, metric in failures.items()}


def _of_several_samples(groups: Sequence[SampleGroup]) -> dict[str, np.ndarray]:
    """Return the metrics that need several samples per prompt, by name, [prompts] each; {} if n is
    1."""
    n = len(groups[0].samples)
    if n == 1:
        return {}
    scores = np.array([[sample.reward for sample in group.samples] for group in groups])
    right = np.array([[_right(sample) for sample in group.samples] for group in groups])
    answers = [[sample.answer for sample in group.samples] for group in groups]
    ks = sizes(n)
    values = {f"best_at_{k}": best_at(scores, k) for k in ks}
    if any(answer is not None for row in answers for answer in row):
        rows = zip(scores.tolist(), answers, strict=True)
        majority = np.array([majority_at(*row, ks) for row in rows])
        values |= {f"maj_at_{k}": majority[:, i] for i, k in enumerate(ks)}
    if np.isin(right, (0, 1)).all():
        values |= {f"pass_at_{k}": best_at(right, k) for k in ks}
    return values | {"accuracy/std": scores.std(axis=1)}


def _right(sample: Sample) -> float:
    return sample.reward_metrics.get("acc", sample.reward)
