"""Tokens per second of updates, and the share of the device's operations that the model needs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from gpu_checks.models import gmpo, save_random_model, sequences_of
from gpu_checks.outcome import Bound, Outcome, Values, free_memory, now
from gpu_checks.sizes import Sizes
from gpu_checks.worker import running
from mcore_rl.metrics import to_floats

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12}
"""Dense bfloat16 operations per second by part of the device's name, from NVIDIA's data sheets."""


def step_dense(sizes: Sizes, device: torch.device) -> Outcome:
    """Speed of updates of a dense model, Qwen3-0.6B's shape on CUDA."""
    return training_speed(sizes.dense, sizes, device)


def step_moe(sizes: Sizes, device: torch.device) -> Outcome:
    """Speed of updates of a small mixture of experts."""
    return training_speed(sizes.moe, sizes, device)


def step_many_experts(sizes: Sizes, device: torch.device) -> Outcome:
    """Speed of updates of two layers of Qwen3-30B-A3B's shape: 128 experts, of which a token has
    eight."""
    return training_speed(sizes.many_experts, sizes, device)


def training_speed(config: PreTrainedConfig, sizes: Sizes, device: torch.device) -> Outcome:
    """Return tokens per second and the share of the device's operations that the model needs."""
    sequences = sequences_of(sizes.step_lengths, config.vocab_size)
    tokens = sum(sizes.step_lengths)
    with tempfile.TemporaryDirectory() as root:
        save_random_model(config, Path(root), device)
        free_memory(device)
        with running(Path(root), device, sizes.step_micro_batch, dtype="bfloat16") as (cluster, _):
            seconds, norms = [], []
            for _ in range(4):
                cluster.trainer.begin_step()
                start = now(device)
                metrics = to_floats(cluster.trainer.update(sequences, gmpo()))
                seconds.append(now(device) - start)
                norms.append(metrics.get("actor/grad_norm", float("nan")))
            values: Values = {"tokens_per_s": tokens / min(seconds[1:])}
            if device.type == "cuda":
                values["memory_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    flops = training_flops(config, sizes.step_lengths)
    values["model_tflops"] = flops / min(seconds[1:]) / 1e12
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    if peak:
        values["mfu"] = values["model_tflops"] * 1e12 / peak
    values["largest_grad_norm"], values["smallest_grad_norm"] = max(norms), min(norms)
    wrong = sum(not 0 < norm < float("inf") for norm in norms)
    return Outcome(values, [Bound("norms_not_finite_or_0", wrong, 0, "an update would be skipped")])


def training_flops(config: Any, lengths: Sequence[int]) -> float:
    """Return operations of forward and backward: 6 per weight that acts on a token (the output
    layer's included, the embedding's not), and 6 * heads * head_dim * length^2 per layer for the
    causal half of attention. Recomputation is not counted."""
    hidden, heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
    attention = hidden * head_dim * (2 * heads + 2 * config.num_key_value_heads)
    if hasattr(config, "num_experts_per_tok"):
        mlp = 3 * hidden * config.moe_intermediate_size * config.num_experts_per_tok
    else:
        mlp = 3 * hidden * config.intermediate_size
    layers = config.num_hidden_layers
    weights = layers * (attention + mlp) + hidden * config.vocab_size
    scores = layers * heads * head_dim * sum(length**2 for length in lengths)
    return 6.0 * (weights * sum(lengths) + scores)
