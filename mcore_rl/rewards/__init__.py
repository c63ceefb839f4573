"""Rewards: the score of a response.

A new reward is one file with a function under `@REWARDS.register("<data_source>")` and its name in
the import below.
"""

from mcore_rl.rewards import (
    classification,
    code,
    exact_number,
    gsm8k,
    math,
    math_dapo,
    math_reasoning,
    piecewise_continuity,
    qa,
    trivia,
    verl_names,
)

__all__ = [
    "classification",
    "code",
    "exact_number",
    "gsm8k",
    "math",
    "math_dapo",
    "math_reasoning",
    "piecewise_continuity",
    "qa",
    "trivia",
    "verl_names",
]
