"""How far the log-probabilities that two programs give the same tokens may be apart; natural
logarithms, absolute.

In bfloat16 rounding flips an expert here and there, which moves a token by far more than rounding
does itself, so the largest difference alone tells little: a wrong model moves every token by less.
What tells them apart is how far most tokens move, and the mean.
"""

from __future__ import annotations

FLOAT32 = 1e-4
"""What float32 explains: `mcore-rl verify model` demands it, the report draws it."""

AFTER_SYNC = {"float32": 1e-3, "bfloat16": 1.0}
"""Largest difference with which a run starts, by the type of the trainer's weights, where
`rollout.logprob_tolerance` says nothing; wider than FLOAT32, for models of any depth."""

SHARES = {"the median": 1 / 100, "the mean": 1 / 20, "9 of 10": 1 / 5, "the largest": 1.0}
"""Of that tolerance, what the differences of tokens may be in bfloat16. In float32, where nothing
but rounding is left, only the largest counts."""
