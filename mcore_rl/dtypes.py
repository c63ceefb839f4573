"""The dtypes for training a model and sampling from it, by their names on the command line."""

from __future__ import annotations

from mcore_rl.lazy_torch import torch

BYTES = {"float32": 4, "bfloat16": 2}
"""Bytes of a number, by the name of its dtype."""

DTYPES = tuple(BYTES)


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of one of the names."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
