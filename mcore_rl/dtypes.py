"""The types of numbers that a model is trained and sampled from in, by their names on the command
line."""

from __future__ import annotations

from mcore_rl.lazy_torch import torch

BYTES = {"float32": 4, "bfloat16": 2}
"""Of a number, by the name of its type."""

DTYPES = tuple(BYTES)


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's type of one of the names."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
