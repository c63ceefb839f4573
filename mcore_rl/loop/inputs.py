"""What a loop reads: prompts, rewards and how far to go. `run/inputs.py` loads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mcore_rl.data.prompts import ItemStream
from mcore_rl.rewards.score import RewardScorer
from mcore_rl.types import Prompt, Routing, TokenSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInputs:
    """Inputs of a reinforcement-learning run."""

    prompts: ItemStream[Prompt]
    val_prompts: Sequence[Prompt]
    scorer: RewardScorer
    stop_token_ids: Sequence[int]
    total_steps: int
    routing: Routing | None = None
    """The experts whose routes the engines return; None: they do not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SftInputs:
    """Inputs of a supervised fine-tuning run."""

    sequences: ItemStream[TokenSequence]
    total_steps: int
