"""What a reward function is, where it is found by name, and the sections of the configuration."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict, get_type_hints, is_typeddict

from mcore_rl.errors import refuse_unread, require, require_one_of
from mcore_rl.registry import Registry

Score = float | Mapping[str, Any]
"""A number, or a mapping with the number under "score" and, under ANSWER, the answer that the
response states; its other numbers are logged by name."""

ANSWER = "pred"
"""verl's name for it. Equal texts are votes for one answer; None or "": no answer is stated."""


class AnswerScore(TypedDict):
    """The score of a response, and its answer."""

    score: float
    pred: str | None


BUILT_IN_NUMBERS = ("baseline", "response_tokens")
"""Names that no other number of a reward may have: `reward/baseline/mean` and
`eval/<data source>/response_tokens/mean` are metrics of every run."""


class RewardFunction(Protocol):
    """Scores one response; may be `async`, and is then awaited for several at a time.

    The parameters are passed by name and are those of verl's reward functions. It is called in
    processes of its own, several of them, so what it keeps in globals is not shared. A registered
    function with a further parameter `sandbox` gets the section `reward.sandbox`, and the run only
    starts if the sandbox holds.
    """

    def __call__(
        self, *, data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping | None
    ) -> Score | Awaitable[Score]: ...


REWARDS: Registry[Callable[..., Score | Awaitable[Score]]] = Registry("reward", "data_source")
"""A name that ends in `*` stands for all data sources with this prefix."""


def find_reward(data_source: str) -> Callable[..., Score | Awaitable[Score]]:
    """Return the reward of a data source.

    Raises:
        UserError: if there is none; the text lists those there are.
    """
    starts = (name for name in REWARDS if name.endswith("*") and data_source.startswith(name[:-1]))
    return REWARDS.get(data_source if data_source in REWARDS else next(starts, data_source))


def further_numbers(function: Callable[..., Any]) -> frozenset[str] | None:
    """Return the names of the numbers that a reward gives beside its score, as its annotation says:
    `float` for none, a TypedDict for its keys but the answer; None where it says neither."""
    returned = get_type_hints(function).get("return")
    if returned is float:
        return frozenset()
    if not is_typeddict(returned):
        return None
    return frozenset(get_type_hints(returned)) - {"score", ANSWER}


PROTECTIONS = ("privileges", "files", "calls")
"""Protections of the sandbox besides limits: no capabilities, Landlock, seccomp (see `jail/`)."""


@dataclass(kw_only=True, slots=True)
class SandboxConfig:
    """`reward.sandbox`: what a program that a model wrote may use."""

    timeout_s: float = 20.0
    """Longest time for all tests of one program; less than reward.timeout_s."""
    test_timeout_s: float = 6.0
    """Longest time for one test, by the clock."""
    cpu_s: int = 4
    """Most CPU time for one test, in whole seconds."""
    memory_mib: int = 512
    """Largest address space, the interpreter's 20 to 30 MiB and its threads' stacks included."""
    file_mib: int = 16
    """Largest file, and most for all files together, deleted and unnamed ones included."""
    output_mib: int = 4
    """Most output of one test."""
    allow_missing: list[str] = field(default_factory=list)
    """Protections that the run may do without where the system lacks them: privileges, files,
    calls. Without "files" programs read what this user reads; without "calls" they reach the
    network, start processes and end others of this user."""
    share_assertions: bool = False
    """Run assertions that cannot be split into a call and an expected result in the program's own
    process. The program can then read the expected result, or replace the comparison, and pass
    without solving the task; models learn this. False refuses such data before the run starts."""

    def __post_init__(self) -> None:
        for name in (
            "timeout_s", "test_timeout_s", "cpu_s", "memory_mib", "file_mib", "output_mib"
        ):  # fmt: skip
            value = getattr(self, name)
            require(value > 0, f"reward.sandbox.{name}", value, "must be > 0")
        for name in self.allow_missing:
            require_one_of("reward.sandbox.allow_missing", name, PROTECTIONS)


@dataclass(kw_only=True, slots=True)
class OverlongBufferConfig:
    """`reward.overlong_buffer`: a penalty on training responses that come near the limit."""

    enable: bool = False
    """If off, the two keys below are not read."""
    len: int = 0
    """Tokens before data.max_response_length over which the penalty grows."""
    penalty_factor: float = 1.0
    """The penalty at the limit."""

    def __post_init__(self) -> None:
        section = "reward.overlong_buffer"
        for name, is_default in (
            ("len", self.len == 0),
            ("penalty_factor", self.penalty_factor == 1.0),
        ):
            rule = f"is not read with {section}.enable=false"
            value = getattr(self, name)
            require(self.enable or is_default, f"{section}.{name}", value, rule, "Remove it.")
        if self.enable:
            require(self.len > 0, f"{section}.len", self.len, "must be > 0")
            factor = self.penalty_factor
            require(factor > 0, f"{section}.penalty_factor", factor, "must be > 0")


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    """The `reward` section: the processes that score, and what happens when a function fails."""

    num_workers: int | None = None
    """Processes that score side by side; None: one per CPU of this process."""
    max_concurrency: int = 64
    """Calls of an `async` function that are awaited at one time, over all processes."""
    timeout_s: float | None = 30.0
    """Longest time for one response, in seconds; then its process is killed and replaced, or the
    call of an `async` function cancelled. A batch function has as much for each of its responses.
    None for no limit."""
    memory_gib: float | None = 8.0
    """Most private memory of one process; beyond it the function gets a MemoryError. None for no
    limit. A lower limit of the system, set by `ulimit -d` for example, holds instead."""
    on_error: str = "raise"
    """A function that raises, exceeds the time, ends its process, or returns no finite number:
    "raise" stops the run and names the sample, "zero" scores the sample 0 and counts it in
    `reward/num_errors`."""
    max_failed_frac: float = 0.1
    """With on_error=zero, the largest share of a validation's responses that may fail; beyond it
    the run stops, since its accuracy means nothing. 1 for no limit."""
    after_think: bool | None = None
    """Rewards read only what follows `</think>`, nothing if `<think>` never closes; a chat template
    that ends in `<think>` opens it, too. None: those of this package do, a custom function gets the
    whole response."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    overlong_buffer: OverlongBufferConfig = field(default_factory=OverlongBufferConfig)

    def __post_init__(self) -> None:
        for name in ("num_workers", "max_concurrency"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"reward.{name}", value, "must be at least 1")
        for name in ("timeout_s", "memory_gib"):
            value = getattr(self, name)
            require(
                value is None or value > 0,
                f"reward.{name}",
                value,
                "must be > 0",
                "Set it to null for no limit.",
            )
        require_one_of("reward.on_error", self.on_error, ["raise", "zero"])
        most = self.max_failed_frac
        require(0 < most <= 1, "reward.max_failed_frac", most, "must lie in (0, 1]")
        if self.on_error == "raise":
            refuse_unread(self, "reward", ["max_failed_frac"], "on_error=raise")

    @property
    def max_workers(self) -> int:
        return self.num_workers or len(os.sched_getaffinity(0))


@dataclass(kw_only=True, slots=True)
class CustomRewardConfig:
    """The `custom_reward_function` section: a user's own function, used for all data sources; of
    one response or of a batch, see `custom.py`."""

    path: str | None = None
    """Python file that defines the function; None for the rewards named by the data."""
    name: str = "compute_score"
    """Name of the function in that file."""
    reward_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the function, passed by name with every response."""

    def __post_init__(self) -> None:
        for key, is_default in (
            ("name", self.name == "compute_score"),
            ("reward_kwargs", not self.reward_kwargs),
        ):
            require(
                self.path is not None or is_default,
                f"custom_reward_function.{key}",
                getattr(self, key),
                "has no effect without custom_reward_function.path",
                "Set the path of the file that defines it.",
            )
