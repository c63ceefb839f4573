"""Logits of Megatron's layers against those of transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from gpu_checks.models import parity_models, save_random_model, sequences_of
from gpu_checks.outcome import Bound, Outcome, free_memory, within
from gpu_checks.sizes import Sizes
from gpu_checks.worker import layers_here, running
from mcore_rl.types import TokenSequence


def logits_float32(sizes: Sizes, device: torch.device) -> Outcome:
    """Differences of logits in float32, with the local layers."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    values: dict[str, float] = {}
    for family, folder, sequences in saved_models(sizes, device):
        expected = hugging_face_logits(folder, sequences, torch.float32, device)
        found = megatron_logits(folder, sequences, device, dtype="float32")
        values[family] = float((found - expected).abs().max())
        values[f"{family}/median"] = float((found - expected).abs().median())
    bounds = [
        Bound("dense", values["dense"], 1e-4, "float32 sums in another order; 4e-6 seen on CPU")
    ]
    if HAVE_TE:
        reason = "Megatron's router takes Transformer Engine's products, in TF32 on a device"
        bounds.append(Bound("moe/median", values["moe/median"], 1e-3, reason))
    else:
        reason = "as dense: the router's scores are float32 too"
        bounds.append(Bound("moe", values["moe"], 1e-4, reason))
    return Outcome(values, bounds)


def logits_bfloat16(sizes: Sizes, device: torch.device) -> Outcome:
    """Errors of logits in bfloat16 against transformers' in float32, as multiples of the error
    that transformers makes itself in bfloat16; for every kind of layers that can run here."""
    values: dict[str, float] = {}
    for family, folder, sequences in saved_models(sizes, device):
        exact = hugging_face_logits(folder, sequences, torch.float32, device)
        theirs = hugging_face_logits(folder, sequences, torch.bfloat16, device)
        for kind in layers_here("bfloat16"):
            ours = megatron_logits(
                folder, sequences, device, dtype="bfloat16", transformer_impl=kind
            )
            # The median, since one token that is routed to another expert is far off.
            errors = [(x - exact).abs().median() for x in (ours, theirs)]
            values[f"{family}/{kind}"] = float(errors[0] / errors[1])
    return within(values, 2.0, "both round to bfloat16 after each layer, in other places")


def saved_models(
    sizes: Sizes, device: torch.device
) -> Iterator[tuple[str, Path, Sequence[TokenSequence]]]:
    """Yield each model with random weights: its name, its folder while it is used, its inputs."""
    for family, config in parity_models(sizes).items():
        with tempfile.TemporaryDirectory() as folder:
            save_random_model(config, Path(folder), device)
            yield family, Path(folder), sequences_of(sizes.parity_lengths, config.vocab_size)


@torch.no_grad()
def hugging_face_logits(
    folder: Path, sequences: Sequence[TokenSequence], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return [T - number of sequences, V] float32, predictions of all tokens but the first ones."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(device)
    logits = [
        model(torch.tensor(s.token_ids, device=device).long().unsqueeze(0)).logits[0, :-1].float()
        for s in sequences
    ]
    del model
    free_memory(device)
    return torch.cat(logits)


def megatron_logits(
    folder: Path, sequences: Sequence[TokenSequence], device: torch.device, **megatron: Any
) -> torch.Tensor:
    """Return the same from one packed row: the output layer's input times its weight."""
    captured: list[torch.Tensor] = []
    with running(folder, device, len(sequences), **megatron) as (cluster, worker):
        model = worker.actor.chunks[0].module
        model.output_layer.register_forward_pre_hook(
            lambda _, args: captured.append(args[0].squeeze(1).detach())
        )
        cluster.trainer.logprobs(sequences)
        weight = model.output_layer.weight
        if model.share_embeddings_and_output_weights:
            weight = model.shared_embedding_or_output_weight()
        (hidden_TH,) = captured
        rows = sum(len(s.token_ids) - 1 for s in sequences)
        return (hidden_TH @ weight.detach().t())[:rows, : model.real_vocab_size].float()
