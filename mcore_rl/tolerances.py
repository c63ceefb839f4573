"""How far the log-probabilities that two programs give the same tokens may be apart; natural
logarithms, absolute.

In bfloat16 rounding sometimes changes the expert of a token, which changes its log-probability far
more than rounding itself. So the largest difference alone says little: a wrong model changes every
token, but less. The mean and the difference of most tokens distinguish the two.
"""

from __future__ import annotations

FLOAT32 = 1e-4
"""Largest difference explained by float32: the limit of `mcore-rl verify model`, and a line in the
report."""

AFTER_SYNC = {"float32": 1e-3, "bfloat16": 1.0}
"""Largest difference with which a run starts, by the dtype of the trainer's weights, if
`rollout.logprob_tolerance` is not set; wider than FLOAT32, for models of any depth."""

SHARES = {"the median": 1 / 100, "the mean": 1 / 20, "9 of 10": 1 / 5, "the largest": 1.0}
"""Limits in bfloat16, as shares of that tolerance. In float32, where only rounding is left, only
the largest difference counts."""
