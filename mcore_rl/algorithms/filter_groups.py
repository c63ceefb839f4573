"""DAPO's dynamic sampling: groups whose samples are all alike teach nothing and are dropped.

The choice alone; that further prompts are drawn until the batch is full is `loop/collect.py`.

Source: DAPO, arXiv:2503.14476, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mcore_rl.errors import UserError, closest_hint, refuse_unread, require
from mcore_rl.types import Sample, SampleGroup

KNOWN_METRICS = ("score", "acc", "seq_reward", "seq_final_reward")
"""What groups can be compared by whatever their reward returns."""


@dataclass(kw_only=True, slots=True)
class FilterGroupsConfig:
    """Which groups train (`algorithm.filter_groups`); off by default."""

    enable: bool = False
    """Train only groups whose samples differ in `metric`, and draw prompts until there are enough.
    Off, the two below are not read."""
    metric: str = "score"
    """"score": what the reward function returned; "acc": the number of that name where it returns
    one, otherwise the score; "seq_reward" and, where no KL is taken off the reward,
    "seq_final_reward": the score with the overlong penalty; or another number that the reward
    function returns."""
    max_num_gen_batches: int = 0
    """Batches of prompts in one step, after which the run stops; 0: three passes over the data, or
    one if that gave no group at all."""

    def __post_init__(self) -> None:
        limit = self.max_num_gen_batches
        require(limit >= 0, "algorithm.filter_groups.max_num_gen_batches", limit, "must be >= 0")
        if not self.enable:
            section = "algorithm.filter_groups"
            refuse_unread(self, section, ("metric", "max_num_gen_batches"), "enable=false")


def informative_groups(groups: Sequence[SampleGroup], metric: str) -> list[SampleGroup]:
    """Return the groups whose samples do not all have one value of `metric`, in order.

    A group of one is kept: there is nothing to compare it with.

    Raises:
        UserError: if a sample has no such number.
    """
    return [
        group
        for group in groups
        if len(group.samples) == 1 or len({_value(sample, metric) for sample in group.samples}) > 1
    ]


def _value(sample: Sample, metric: str) -> float:
    if metric in ("seq_reward", "seq_final_reward"):
        return sample.reward
    # Without a penalty the score is the reward.
    numbers = {"score": sample.reward, **sample.reward_metrics}
    numbers.setdefault("acc", numbers["score"])
    if metric not in numbers:
        known = sorted({*KNOWN_METRICS, *numbers})
        raise UserError(
            f"algorithm.filter_groups.metric={metric!r} is no number of the reward of "
            f"{sample.prompt.uid}.{closest_hint(metric, known)} There are: {', '.join(known)}."
        )
    return numbers[metric]
