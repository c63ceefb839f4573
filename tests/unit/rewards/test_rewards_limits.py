"""Numbers of the `reward` section: the last that is taken, the first that is refused by its key."""

import os
from typing import Any

import pytest

from mcore_rl.errors import UserError
from mcore_rl.rewards.base import (
    CustomRewardConfig,
    OverlongBufferConfig,
    RewardConfig,
    SandboxConfig,
)

ZERO = {"on_error": "zero"}
BUFFER = {"enable": True, "len": 1}

# (section, its class, key, taken, refused, rule, what else is set)
LIMITS = [
    ("reward", RewardConfig, "num_workers", 1, 0, "must be at least 1", {}),
    ("reward", RewardConfig, "max_concurrency", 1, 0, "must be at least 1", {}),
    ("reward", RewardConfig, "timeout_s", 0.5, 0.0, "must be > 0", {}),
    ("reward", RewardConfig, "memory_gib", 0.5, 0.0, "must be > 0", {}),
    ("reward", RewardConfig, "max_failed_frac", 1.0, 1.5, "must lie in (0, 1]", ZERO),
    ("reward", RewardConfig, "max_failed_frac", 0.25, 0.0, "must lie in (0, 1]", ZERO),
    ("reward.sandbox", SandboxConfig, "timeout_s", 0.5, 0.0, "must be > 0", {}),
    ("reward.sandbox", SandboxConfig, "test_timeout_s", 0.5, 0.0, "must be > 0", {}),
    ("reward.sandbox", SandboxConfig, "cpu_s", 1, 0, "must be > 0", {}),
    ("reward.sandbox", SandboxConfig, "memory_mib", 1, 0, "must be > 0", {}),
    ("reward.sandbox", SandboxConfig, "file_mib", 1, 0, "must be > 0", {}),
    ("reward.sandbox", SandboxConfig, "output_mib", 1, 0, "must be > 0", {}),
    ("reward.overlong_buffer", OverlongBufferConfig, "len", 1, 0, "must be > 0", {"enable": True}),
    ("reward.overlong_buffer", OverlongBufferConfig, "penalty_factor", 0.5, 0.0, "must be", BUFFER),
]


@pytest.mark.parametrize(("section", "kind", "key", "taken", "refused", "rule", "others"), LIMITS)
def test_a_number_is_taken_up_to_its_limit_and_refused_beyond(
    section, kind, key, taken, refused, rule, others
):
    assert getattr(kind(**others, **{key: taken}), key) == taken
    with pytest.raises(UserError) as caught:
        kind(**others, **{key: refused})
    assert str(caught.value).startswith(f"{section}.{key}={refused} {rule}")


@pytest.mark.parametrize("key", ["timeout_s", "memory_gib"])
def test_a_limit_of_a_function_can_be_lifted(key):
    lifted: dict[str, Any] = {key: None}
    assert getattr(RewardConfig(**lifted), key) is None


def test_rewards_score_in_as_many_processes_as_there_are_cpus_unless_told():
    assert RewardConfig(num_workers=3).max_workers == 3
    assert RewardConfig().max_workers == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        (OverlongBufferConfig, "len", 1, "reward.overlong_buffer.len=1 is not read"),
        (OverlongBufferConfig, "penalty_factor", 2.0, "reward.overlong_buffer.penalty_factor=2.0"),
        (RewardConfig, "max_failed_frac", 0.5, "reward.max_failed_frac=0.5 is not read"),
        (CustomRewardConfig, "name", "score", "custom_reward_function.name='score' has no effect"),
        (CustomRewardConfig, "reward_kwargs", {"a": 1}, "custom_reward_function.reward_kwargs={"),
    ],
)
def test_what_would_not_be_read_is_refused(kind, key, value, message):
    with pytest.raises(UserError) as caught:
        kind(**{key: value})
    assert str(caught.value).startswith(message)
