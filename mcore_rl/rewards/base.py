"""What a reward function is, where it is found by name, and the `reward` section."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mcore_rl.errors import require, require_one_of
from mcore_rl.registry import Registry

Score = float | Mapping[str, Any]
"""A number, or a mapping with the number under "score"; its other numbers are logged by name."""


class RewardFunction(Protocol):
    """Scores one response; may be `async`.

    The parameters are passed by name and are those of verl's reward functions.
    """

    def __call__(
        self, *, data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping | None
    ) -> Score | Awaitable[Score]: ...


REWARDS: Registry[RewardFunction] = Registry("reward", "data_source")


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    """The `reward` section: what happens when a reward function misbehaves."""

    timeout_s: float | None = 10.0
    """Longest time for one response, in seconds; None for no limit."""
    on_error: str = "raise"
    """A function that raises, exceeds the time, or returns no finite number: "raise" stops the run
    and names the sample, "zero" scores the sample 0 and counts it in `reward/num_errors`."""

    def __post_init__(self) -> None:
        require(
            self.timeout_s is None or self.timeout_s > 0,
            "reward.timeout_s",
            self.timeout_s,
            "must be > 0",
            "Set it to null for no limit.",
        )
        require_one_of("reward.on_error", self.on_error, ["raise", "zero"])


@dataclass(kw_only=True, slots=True)
class CustomRewardConfig:
    """The `custom_reward_function` section: a user's own function, used for all data sources."""

    path: str | None = None
    """Python file that defines the function; None for the rewards named by the data."""
    name: str = "compute_score"
    """Name of the function in that file."""

    def __post_init__(self) -> None:
        require(
            self.path is not None or self.name == "compute_score",
            "custom_reward_function.name",
            self.name,
            "has no effect without custom_reward_function.path",
            "Set the path of the file that defines it.",
        )
