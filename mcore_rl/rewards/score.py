"""Groups to scored groups: finds the reward of each prompt, runs it, and reports.

Invariants: no sample leaves without a finite reward; a reward that fails is never a silent zero
(the run stops, or the failure is logged and counted); samples are scored one after another in
order, so the same responses give the same rewards.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import logging
import math
import numbers
import statistics
from collections.abc import Iterable, Mapping, Sequence

from mcore_rl import metrics
from mcore_rl.errors import UserError
from mcore_rl.metrics import Metrics
from mcore_rl.rewards.base import REWARDS, CustomRewardConfig, RewardConfig, RewardFunction
from mcore_rl.rewards.custom import load_custom_reward
from mcore_rl.rewards.time_limit import TimeLimitExceeded, time_limit
from mcore_rl.types import Sample, SampleGroup

logger = logging.getLogger(__name__)


class RewardScorer:
    """Scores samples with the reward that their data source names, or with the user's own.

    Args:
        cfg: the `reward` section.
        custom: the `custom_reward_function` section; its function, if any, scores all samples.

    Raises:
        UserError: if the custom function cannot be loaded.
    """

    def __init__(self, cfg: RewardConfig, custom: CustomRewardConfig) -> None:
        self._cfg = cfg
        self._custom = load_custom_reward(custom)

    def check(self, data_sources: Iterable[str]) -> None:
        """Return if every data source has a reward; call it before the run starts.

        Raises:
            UserError: for the first one that has none, listing those there are.
        """
        for data_source in sorted(set(data_sources)):
            self._function(data_source)

    def score(self, groups: Sequence[SampleGroup]) -> tuple[list[SampleGroup], Metrics]:
        """Return the groups with `reward` and `reward_metrics` set, and the `reward/` metrics.

        Raises:
            UserError: under `reward.on_error=raise`, for the first sample whose reward fails.
        """
        errors: list[str] = []
        scored = [
            dataclasses.replace(
                group, samples=[self._score_sample(sample, errors) for sample in group.samples]
            )
            for group in groups
        ]
        if errors:
            logger.warning("%d samples scored 0 because %s", len(errors), errors[0])
        return scored, _reward_metrics(scored, num_errors=len(errors))

    def _function(self, data_source: str) -> RewardFunction:
        if self._custom is not None:
            return self._custom
        try:
            return REWARDS.get(data_source)
        except UserError as error:
            raise UserError(
                f"{error} Or set custom_reward_function.path to a file with your own."
            ) from None

    def _score_sample(self, sample: Sample, errors: list[str]) -> Sample:
        prompt = sample.prompt
        function = self._function(prompt.data_source)
        limit = time_limit(self._cfg.timeout_s, "reward.timeout_s")
        try:
            with limit:
                result = function(
                    data_source=prompt.data_source,
                    solution_str=sample.response_text,
                    ground_truth=prompt.ground_truth,
                    extra_info=prompt.extra_info,
                )
                if inspect.isawaitable(result):
                    result = asyncio.run(_result_of(result))
            reward, reward_metrics = _read_result(result)
        # The function is the user's: whatever it raises is named below and stops or is counted.
        except (Exception, TimeLimitExceeded) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            text = (
                f"the reward of {prompt.data_source!r} failed on {prompt.uid} "
                f"sample {sample.index} ({reason})"
            )
            if self._cfg.on_error == "raise":
                raise UserError(
                    f"{text}. Set reward.on_error=zero to score such samples 0."
                ) from error
            errors.append(text)
            reward, reward_metrics = 0.0, {}
        return dataclasses.replace(sample, reward=reward, reward_metrics=reward_metrics)


async def _result_of(awaitable):
    return await awaitable


def _read_result(result: object) -> tuple[float, dict[str, float]]:
    """Return the score and the other numbers of what a reward function returned.

    Raises:
        TypeError: if the score is missing or not a number.
        ValueError: if it is NaN or infinite.
    """
    others = dict(result) if isinstance(result, Mapping) else {"score": result}
    if "score" not in others:
        raise TypeError(f"it returned a mapping without 'score': {sorted(map(str, others))}")
    score = others.pop("score")
    if not isinstance(score, numbers.Real):
        raise TypeError(f"it returned {score!r}, not a number")
    if not math.isfinite(score):
        raise ValueError(f"it returned {score!r}, not a finite number")
    logged = {str(k): float(v) for k, v in others.items() if isinstance(v, numbers.Real)}
    return float(score), logged


def _reward_metrics(groups: Sequence[SampleGroup], num_errors: int) -> Metrics:
    """Return mean and population std of the rewards, the mean of each further number over the
    samples that have it, and the failures."""
    samples = [sample for group in groups for sample in group.samples]
    if not samples:
        return {}
    rewards = [sample.reward for sample in samples]
    named = metrics.merge(
        {f"reward/{name}/mean": metrics.mean(value) for name, value in s.reward_metrics.items()}
        for s in samples
    )
    return {
        "reward/mean": metrics.mean(statistics.fmean(rewards), len(rewards)),
        "reward/std": metrics.mean(statistics.pstdev(rewards), len(rewards)),
        "reward/num_errors": metrics.total(num_errors),
        "reward/failed_frac": metrics.mean(num_errors / len(samples), len(samples)),
        **named,
    }
