"""Seconds of one training step of a mixture by two ways to compute its experts on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/experts.py --hidden 512 --experts 32 --tokens 64 2048

The step is that of `train_step.py`: forward, GMPO's loss, backward, clipping and an AdamW update,
in float32, in one process. The ways take turns; figures are medians, ratios are of medians.

    loop      Megatron's local experts, one after the other: what runs on a CPU
    grouped   one MLP with torch's grouped products: what runs on CUDA in bfloat16
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch.distributed as dist
import transformers
from megatron.core.transformer.moe.experts import SequentialMLP
from train_step import CLOCKS, make_sequences, our_step, seconds_of
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from mcore_rl.megatron.experts import GroupedExperts

NUM_LAYERS = 2
LENGTH = 64


def model_config(hidden: int, experts: int, top_k: int) -> Qwen3MoeConfig:
    """Return the config of a small mixture whose experts are as wide as the model."""
    return Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=hidden,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        intermediate_size=3 * hidden,
        moe_intermediate_size=hidden,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        max_position_embeddings=2 * LENGTH,
    )


WAYS = {"loop": SequentialMLP.forward, "grouped": GroupedExperts.grouped}


def measure(num_tokens: int, args: argparse.Namespace, folder: Path) -> None:
    """Print one line of the table."""
    config = model_config(args.hidden, args.experts, args.top_k)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    sequences = make_sequences([LENGTH] * (num_tokens // LENGTH), config.vocab_size)
    clock: Callable[[], float] = CLOCKS[args.clock]
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with our_step(folder, sequences) as step:
        for repeat in range(args.repeats + 1):
            for way, found in seconds.items():
                with mock.patch.object(GroupedExperts, "forward", WAYS[way]):
                    found.append(seconds_of(step, clock))
            if repeat == 0:
                seconds = {way: [] for way in seconds}  # the warm-up
    medians = {way: statistics.median(found) for way, found in seconds.items()}
    ratio = medians["loop"] / medians["grouped"]
    print(
        f"{num_tokens:6}  {medians['loop']:8.3f}  {medians['grouped']:11.3f}  {ratio:14.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each way")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    print(f"hidden {args.hidden}, {args.experts} experts, top-{args.top_k}, {args.clock} clock")
    print("tokens  loop (s)  grouped (s)  loop / grouped")
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        for num_tokens in args.tokens:
            measure(num_tokens, args, Path(folder) / "model")
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
