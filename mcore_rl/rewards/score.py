"""From groups to scored groups: finds the reward of each prompt, runs it, and reports.

Invariants: no sample leaves without a finite reward; a reward that fails is never a silent zero
(the run stops, or the failure is logged and counted, and the run stops all the same where too many
fail); samples keep their order, whichever was scored first.
"""

from __future__ import annotations

import inspect
import logging
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from mcore_rl import metrics
from mcore_rl.errors import UserError, require
from mcore_rl.metrics import Metrics
from mcore_rl.rewards.base import (
    CustomRewardConfig,
    RewardConfig,
    find_reward,
    further_numbers,
)
from mcore_rl.rewards.ground_truth import reader_of
from mcore_rl.rewards.pool import Outcome, RewardPool
from mcore_rl.rewards.sandbox import check_sandbox
from mcore_rl.rewards.thoughts import after_thoughts
from mcore_rl.rewards.worker import RewardCall
from mcore_rl.types import Prompt, Sample, SampleGroup, with_sample_fields

logger = logging.getLogger(__name__)


class CallRunner(Protocol):
    """Runs calls of reward functions; see `RewardPool`."""

    def start(self) -> None:
        """Return when a call can run; raise a UserError if the custom function cannot be loaded."""
        ...

    def run(self, calls: Sequence[RewardCall]) -> Iterator[tuple[int, Outcome]]:
        """Yield the position and outcome of every call, in any order."""
        ...

    def interrupt(self) -> None:
        """Have `run` raise StoppedError, now and from now on; from any thread."""
        ...

    def close(self) -> None:
        """Free all resources."""
        ...


class RewardScorer:
    """Scores samples with the reward that their data source names, or with the user's own.

    Args:
        cfg: the `reward` section.
        custom: the `custom_reward_function` section; its function, if any, scores all samples.
        pool: runs the functions; processes of its own unless given.
    """

    def __init__(
        self, cfg: RewardConfig, custom: CustomRewardConfig, pool: CallRunner | None = None
    ) -> None:
        self._cfg = cfg
        self._is_custom = custom.path is not None
        self._pool = RewardPool(cfg, custom) if pool is None else pool

    def check(self, prompts: Iterable[Prompt]) -> None:
        """Return if every prompt can be scored; call it before the run starts.

        Raises:
            UserError: if the custom function cannot be loaded, for the first prompt whose data
                source has no reward, listing those there are, or if programs are to be run and the
                sandbox does not hold on this system.
        """
        functions = {}
        for prompt in prompts:
            if prompt.data_source not in functions:
                functions[prompt.data_source] = self._function(prompt)
        if any(map(_takes_sandbox, functions.values())):
            self._check_sandbox()
        self._pool.start()

    def lacks(self, name: str, prompts: Iterable[Prompt]) -> str | None:
        """Return the first data source whose reward is known to give no number called `name` in
        addition to the score. The numbers of a custom function are not known before a call."""
        if self._is_custom:
            return None
        for data_source in dict.fromkeys(prompt.data_source for prompt in prompts):
            numbers = further_numbers(find_reward(data_source))
            if numbers is not None and name not in numbers:
                return data_source
        return None

    def check_ground_truths(self, prompts: Iterable[Prompt]) -> None:
        """Return if every prompt has a reference answer that a response can match; a custom
        function and rewards of plug-ins may not declare how they read a row.

        Raises:
            UserError: for the first prompt that has none, naming its row.
        """
        for prompt in prompts:
            function = self._function(prompt)
            read = None if function is None else reader_of(function)
            if read is None:
                continue
            options = [self._cfg.sandbox] if _takes_sandbox(function) else []
            try:
                read(prompt.ground_truth, *options)
            except ValueError as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"{prompt.uid}: {reason}. The reward of data_source={prompt.data_source!r} "
                    "cannot use it. Fix or remove the row."
                ) from None

    def score(self, groups: Sequence[SampleGroup]) -> tuple[list[SampleGroup], Metrics]:
        """Return the groups with the results of the rewards set, and the `reward/` metrics.

        Raises:
            UserError: under `reward.on_error=raise`, for the first reward that fails.
            StoppedError: if it is interrupted.
        """
        samples = [sample for group in groups for sample in group.samples]
        outcomes = [Outcome()] * len(samples)
        for position, outcome in self._pool.run([self._call(sample) for sample in samples]):
            if outcome.error is not None and self._cfg.on_error == "raise":
                raise UserError(
                    f"{_failure(samples[position], outcome.error)}. "
                    "Set reward.on_error=zero to score such samples 0."
                )
            outcomes[position] = outcome
        errors = [_failure(s, o.error) for s, o in zip(samples, outcomes, strict=True) if o.error]
        if errors:
            logger.warning("%d samples scored 0 because %s", len(errors), errors[0])
        _warn_of_nan(samples, outcomes)
        scored = with_outcomes(groups, outcomes)
        return scored, reward_metrics(scored)

    def check_failures(self, groups: Sequence[SampleGroup]) -> None:
        """Raise an error if more samples of a validation failed than `reward.max_failed_frac`
        allows.

        Args:
            groups: all of the validation, scored.

        Raises:
            UserError: if so; the reason of the first failure has been logged.
        """
        statuses = [sample.reward_status for group in groups for sample in group.samples]
        num_failed, most = len(statuses) - statuses.count("scored"), self._cfg.max_failed_frac
        require(
            num_failed <= most * len(statuses),
            "reward.max_failed_frac",
            most,
            f"is exceeded: the reward failed on {num_failed} of {len(statuses)} responses of "
            f"validation, {statuses.count('timeout')} of them by taking too long",
            "The log says why; fix the reward, or raise it to go on with zeros.",
        )

    def interrupt(self) -> None:
        """Abort scoring, now and from now on; from any thread."""
        self._pool.interrupt()

    def close(self) -> None:
        """End the processes that score; without it they end with the program."""
        self._pool.close()

    def _check_sandbox(self) -> None:
        limit_s, sandbox = self._cfg.timeout_s, self._cfg.sandbox
        require(
            limit_s is None or sandbox.timeout_s < limit_s,
            "reward.sandbox.timeout_s",
            sandbox.timeout_s,
            f"must be less than reward.timeout_s={limit_s}",
            "A program that takes too long scores 0; a reward that does is an error.",
        )
        check_sandbox(sandbox)

    def _function(self, prompt: Prompt) -> Callable | None:
        """Return the reward of a prompt's data source; None for the user's own."""
        if self._is_custom:
            return None
        try:
            return find_reward(prompt.data_source)
        except UserError as error:
            raise UserError(
                f"{prompt.uid}: {error} Fix the data, or set custom_reward_function.path to a "
                "file with your own reward."
            ) from None

    def _call(self, sample: Sample) -> RewardCall:
        prompt = sample.prompt
        function = self._function(prompt)
        response, after_think = sample.response_text, self._cfg.after_think
        if after_think or (after_think is None and not self._is_custom):
            response = after_thoughts(prompt.text, response)
        arguments = {
            "data_source": prompt.data_source,
            "solution_str": response,
            "ground_truth": prompt.ground_truth,
            "extra_info": prompt.extra_info,
        }
        if _takes_sandbox(function):
            arguments["sandbox"] = self._cfg.sandbox
        return RewardCall(function=function, arguments=arguments)


def _takes_sandbox(function: Callable | None) -> bool:
    return function is not None and "sandbox" in inspect.signature(function).parameters


def _failure(sample: Sample, reason: str) -> str:
    return (
        f"the reward of {sample.prompt.data_source!r} failed on {sample.prompt.uid} "
        f"sample {sample.index} ({reason})"
    )


def with_outcomes(groups: Sequence[SampleGroup], outcomes: Sequence[Outcome]) -> list[SampleGroup]:
    """Return the groups with the outcomes of their samples, in the order of the groups."""
    return with_sample_fields(
        groups,
        reward=[outcome.score for outcome in outcomes],
        reward_status=[_status(outcome) for outcome in outcomes],
        reward_metrics=[_finite(outcome.others) for outcome in outcomes],
        answer=[outcome.answer for outcome in outcomes],
    )


def _status(outcome: Outcome) -> str:
    if outcome.error is None:
        return "scored"
    return "timeout" if outcome.timed_out else "failed"


def _finite(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _warn_of_nan(samples: Sequence[Sample], outcomes: Sequence[Outcome]) -> None:
    """Warn of further numbers that are NaN or infinite: the samples count as if they had none."""
    without: dict[str, list[str]] = {}
    for sample, outcome in zip(samples, outcomes, strict=True):
        for name, value in outcome.others.items():
            if not math.isfinite(value):
                without.setdefault(name, []).append(f"{sample.prompt.uid} sample {sample.index}")
    for name, where in without.items():
        logger.warning(
            "the reward's number %r is NaN or infinite for %d of %d samples, which are left out of"
            " its mean: first %s", name, len(where), len(samples), where[0]
        )  # fmt: skip


def failure_metrics(samples: Sequence[Sample]) -> Metrics:
    """Return the share of samples whose reward failed, and of those that took too long."""
    statuses = Counter(sample.reward_status for sample in samples)
    num_samples, num_failed = len(samples), len(samples) - statuses["scored"]
    return {
        "failed_frac": metrics.Metric(num_failed, "mean", num_samples),
        "timeout_frac": metrics.Metric(statuses["timeout"], "mean", num_samples),
    }


def reward_metrics(groups: Sequence[SampleGroup]) -> Metrics:
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
    failures = failure_metrics(samples)
    return {
        "reward/mean": metrics.mean(statistics.fmean(rewards), len(rewards)),
        "reward/std": metrics.deviation(rewards),
        "reward/num_errors": metrics.total(failures["failed_frac"].value),
        **{f"reward/{name}": metric for name, metric in failures.items()},
        **named,
    }
