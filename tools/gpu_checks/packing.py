"""Whether a sequence gets the same numbers in a packed row and in one of its own."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from gpu_checks.models import parity_models, save_random_model, sequences_of
from gpu_checks.outcome import Outcome, within
from gpu_checks.sizes import Sizes
from gpu_checks.worker import layers_here, running


def packing(sizes: Sizes, device: torch.device) -> Outcome:
    """Mean differences of logprobs in bfloat16 of sequences in one packed row, and of each in a row
    of its own."""
    errors: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as root:
        config = parity_models(sizes)["dense"]
        save_random_model(config, Path(root), device)
        sequences = sequences_of(sizes.parity_lengths, config.vocab_size)
        for kind in layers_here("bfloat16"):
            packed, alone = (
                _logprobs(Path(root), sequences, device, cut, kind) for cut in (len(sequences), 1)
            )
            errors[kind] = float((packed - alone).abs().mean())
    reason = "matrix products of other sizes round otherwise: steps of bfloat16 on logits of 1 to 8"
    return within(errors, 0.02, reason)


def _logprobs(
    folder: Path, sequences: Any, device: torch.device, cut: int, kind: str
) -> torch.Tensor:
    """Return the logprobs of all tokens, with `cut` sequences in a row."""
    with running(folder, device, cut, dtype="bfloat16", transformer_impl=kind) as (cluster, _):
        lists = cluster.trainer.logprobs(sequences)
    return torch.tensor([value for values in lists for value in values])
