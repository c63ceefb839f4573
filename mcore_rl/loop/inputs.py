"""What a loop reads: prompts, rewards and how far to go. `run/inputs.py` loads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mcore_rl.data.prompts import ItemStream
from mcore_rl.metrics import Metrics
from mcore_rl.rollout.base import EngineAdapters
from mcore_rl.types import Ids, Prompt, Routing, SampleGroup, TokenSequence


class Scorer(Protocol):
    """Says how good samples are; see `RewardScorer`."""

    def score(self, groups: Sequence[SampleGroup]) -> tuple[list[SampleGroup], Metrics]:
        """Return the groups with `reward` and `reward_metrics` set, and the `reward/` metrics."""
        ...

    def check_failures(self, groups: Sequence[SampleGroup]) -> None:
        """Raise an error if too many samples of a validation failed."""
        ...

    def interrupt(self) -> None:
        """Abort scoring, now and from now on; from any thread."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInputs:
    """Inputs of a reinforcement-learning run."""

    prompts: ItemStream[Prompt]
    val_prompts: Sequence[Prompt]
    scorer: Scorer
    stop_token_ids: Sequence[int]
    token_texts: Callable[[Ids], list[str]]
    """Returns the text of each token, for the samples that are logged."""
    total_steps: int
    routing: Routing | None = None
    """The experts whose routes the engines return; None: they return none."""
    adapters: EngineAdapters | None = None
    """Adapters that engines take in addition to the weights; None: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SftInputs:
    """Inputs of a supervised fine-tuning run."""

    sequences: ItemStream[TokenSequence]
    total_steps: int
