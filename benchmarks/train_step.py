"""Tokens per second of one training step, beside Hugging Face transformers.

    python benchmarks/train_step.py                                  # all models and batches
    OMP_NUM_THREADS=1 python benchmarks/train_step.py --models moe --hidden 256 --batches ragged

Both sides do forward, GMPO's loss on the same sequences, backward, clipping and an AdamW update, in
float32, in one process with the same threads, turn about; figures are medians. A token of the rate
is one of a sequence, never padding. Every token but a sequence's first trains.

Ours is an actor as a run builds it (one process, no parallelism): Megatron-Core on packed rows.
Theirs is the transformers model with scaled-dot-product attention and the implementation of experts
named on the command line; sequences are padded on the right; the output layer and the loss see real
positions only; fused AdamW. Batches:

    equal    every sequence has the same length: no padding on either side
    ragged   lengths uniform in 16..512; theirs padded to the longest as one batch
    sorted   the same sequences; theirs in batches of four of like length, gradients summed

The models have 4 layers and 16 times the hidden size as vocabulary, so the output layer has about a
quarter of the work as in Qwen3-0.6B (in larger models it has less). Mixtures have 8 experts, top-2.

The limit is the time of the step's matrix products alone at the speed of one large product of torch
measured in the same run; attention's products are left out.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from mcore_rl.algorithms.losses import PolicyLossConfig
from mcore_rl.algorithms.objective import ObjectiveConfig, resolve_objective
from mcore_rl.algorithms.objectives import PolicyObjective
from mcore_rl.cluster.placement import colocated
from mcore_rl.config.run import train_layout
from mcore_rl.data.batch import pack
from mcore_rl.data.packing import SequenceCount, plan_minibatch
from mcore_rl.megatron.config import MegatronConfig, OptimConfig
from mcore_rl.types import Denominators, MicroBatch, Share, TokenSequence
from mcore_rl.workers.spec import ActorSpec, WorkerSpec

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
NUM_LAYERS = 4
NUM_EXPERTS, TOP_K = 8, 2
LENGTHS = (16, 512)
LR, GRAD_CLIP = 1e-5, 1.0
OBJECTIVE = PolicyObjective(
    spec=resolve_objective(
        ObjectiveConfig(policy_loss=PolicyLossConfig(loss_mode="geo_mean")), LENGTHS[1]
    ),
    log_entropy=False,
)

Step = Callable[[], float]
"""Do one update and return the objective before it."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table."""

    model: str
    hidden: int
    batch: str


def model_config(model: str, hidden: int) -> Any:
    """Return the config of a small model with the proportions of its family."""
    sizes: dict[str, Any] = {
        "vocab_size": 16 * hidden,
        "hidden_size": hidden,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 64,
        "head_dim": 64,
        "intermediate_size": 3 * hidden,
        "max_position_embeddings": 2 * LENGTHS[1],
    }
    if model == "dense":
        return Qwen3Config(**sizes)
    return Qwen3MoeConfig(
        **sizes,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=hidden,
        norm_topk_prob=True,
    )


def products_per_token(config: Any) -> int:
    """Return the multiply-adds per token of one forward pass, attention's products left out."""
    hidden, heads = config.hidden_size, config.head_dim * config.num_attention_heads
    attention = hidden * (2 * heads + 2 * config.head_dim * config.num_key_value_heads)
    if isinstance(config, Qwen3MoeConfig):
        mlp = 3 * hidden * config.moe_intermediate_size * TOP_K + hidden * NUM_EXPERTS
    else:
        mlp = 3 * hidden * config.intermediate_size
    return NUM_LAYERS * (attention + mlp) + hidden * config.vocab_size


def make_sequences(lengths: Sequence[int], vocab_size: int) -> list[TokenSequence]:
    """Return random sequences of which all tokens but the first train."""
    generator = torch.Generator().manual_seed(0)
    return [
        TokenSequence(
            token_ids=torch.randint(vocab_size, (length,), generator=generator).tolist(),
            loss_mask=[False] + [True] * (length - 1),
            advantages=[0.0] + [float(torch.randn((), generator=generator))] * (length - 1),
        )
        for length in lengths
    ]


def make_lengths(batch: str, num_sequences: int) -> list[int]:
    """Return the lengths of a batch; all kinds have about as many tokens."""
    shortest, longest = LENGTHS
    if batch == "equal":
        return [(shortest + longest) // 2] * num_sequences
    generator = torch.Generator().manual_seed(1)
    return torch.randint(shortest, longest + 1, (num_sequences,), generator=generator).tolist()


@contextmanager
def our_step(folder: Path, sequences: list[TokenSequence]):
    """Yield the step of an actor built as a run builds it."""
    from mcore_rl.workers.worker import Worker

    spec = ActorSpec(
        model_path=str(folder),
        megatron=MegatronConfig(dtype="float32"),
        optim=OptimConfig(lr=LR),
        grad_clip=GRAD_CLIP,
        total_steps=10,
        temperature=1.0,
        with_reference=False,
    )
    placement = colocated(train_layout(spec.megatron, 1), 1, engine_size=None)
    worker = Worker(WorkerSpec(placement=placement, actor=spec, engine=None), torch.device("cpu"))
    worker.actor.begin_step()

    def step() -> float:
        plan = plan_minibatch(sequences, 1, SequenceCount(num_sequences=len(sequences)))
        share = Share.of(sequences, plan.micro_batches[0])
        metrics = worker.actor.update(share, plan.denominators, OBJECTIVE)
        return float(metrics["actor/loss"].value)

    try:
        yield step
    finally:
        worker.close()


def their_step(model: Any, sequences: list[TokenSequence], num_sequences: int) -> Step:
    """Return the step of a transformers model on padded batches of `num_sequences`, of like length
    where there are several."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, fused=True)
    trained = sum(sequence.num_trained_tokens for sequence in sequences)
    denominators = Denominators(num_tokens=trained, num_sequences=len(sequences))
    by_length = sorted(sequences, key=lambda sequence: len(sequence.token_ids))
    parts = [
        by_length[start : start + num_sequences]
        for start in range(0, len(sequences), num_sequences)
    ]

    def part_loss(part: list[TokenSequence]) -> torch.Tensor:
        packed = pack(MicroBatch.of(part), pad_token_id=0, device="cpu")
        rows = [torch.tensor(sequence.token_ids[:-1]).long() for sequence in part]
        real = [torch.ones(len(row), dtype=torch.bool) for row in rows]
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence(real, batch_first=True)
        hidden = model.model(
            input_ids, attention_mask=None if mask.all() else mask, use_cache=False
        ).last_hidden_state
        logits = model.lm_head(hidden[mask])
        logprobs_T = -torch.nn.functional.cross_entropy(logits, packed.labels_T, reduction="none")
        loss, _ = OBJECTIVE(logprobs_T, None, packed, denominators)
        return loss

    def step() -> float:
        optimizer.zero_grad()
        total = 0.0
        for part in parts:
            loss = part_loss(part)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        return total

    return step


def seconds_of(step: Step, clock: Callable[[], float]) -> float:
    start = clock()
    step()
    return clock() - start


def product_rate(clock: Callable[[], float]) -> float:
    """Return multiply-adds per second of one large float32 product, the best of four."""
    left, right = torch.randn(2048, 1024), torch.randn(1024, 2048)
    seconds = min(seconds_of(lambda: float((left @ right)[0, 0]), clock) for _ in range(4))
    return 2048 * 1024 * 2048 / seconds


def measure(case: Case, args: argparse.Namespace, folder: Path) -> None:
    """Print one line of the table."""
    config = model_config(case.model, case.hidden)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa", dtype=torch.float32
    )
    model.train()
    if case.model == "moe":
        model.set_experts_implementation(args.experts)
    sequences = make_sequences(make_lengths(case.batch, args.sequences), config.vocab_size)
    num_tokens = sum(len(sequence.token_ids) for sequence in sequences)
    theirs = their_step(model, sequences, 4 if case.batch == "sorted" else len(sequences))
    clock = CLOCKS[args.clock]
    rates, our_seconds, their_seconds = [], [], []
    with our_step(folder, sequences) as ours:
        first, other = ours(), theirs()  # also the warm-up
        # float32 sums in another order.
        assert abs(first - other) < 1e-4, f"the sides disagree on the loss: {first} and {other}"
        for _ in range(args.repeats):
            rates.append(product_rate(clock))
            our_seconds.append(seconds_of(ours, clock))
            their_seconds.append(seconds_of(theirs, clock))
    ratio = statistics.median(t / o for o, t in zip(our_seconds, their_seconds, strict=True))
    seconds, other_seconds = statistics.median(our_seconds), statistics.median(their_seconds)
    # Forward once, backward twice.
    limit = 3 * products_per_token(config) * num_tokens / statistics.median(rates)
    print(
        f"{case.model:5}  {case.hidden:6}  {case.batch:6}  {num_tokens / seconds:10.0f}  "
        f"{num_tokens / other_seconds:12.0f}  {ratio:5.2f}  {limit / seconds:14.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=("dense", "moe"), default=["dense", "moe"])
    parser.add_argument("--hidden", nargs="+", type=int, default=[256, 512])
    parser.add_argument(
        "--batches",
        nargs="+",
        choices=("equal", "ragged", "sorted"),
        default=["equal", "ragged", "sorted"],
    )
    parser.add_argument("--sequences", type=int, default=16, help="sequences of the minibatch")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side")
    parser.add_argument(
        "--experts",
        choices=("eager", "batched_mm", "grouped_mm"),
        default="grouped_mm",
        help="how transformers computes experts; batched_mm copies weights for every token",
    )
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: for a loaded machine, with one thread"
    )
    args = parser.parse_args()
    if args.clock == "cpu" and torch.get_num_threads() != 1:
        parser.error("--clock cpu adds up the threads: set OMP_NUM_THREADS=1")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    print(
        f"{torch.get_num_threads()} threads, {args.sequences} sequences, float32, "
        f"{args.clock} clock"
    )
    print("model  hidden  batch   our tokens/s  their tokens/s  ratio  limit / ours")
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        for name in args.models:
            for hidden in args.hidden:
                for batch in args.batches:
                    case = Case(model=name, hidden=hidden, batch=batch)
                    measure(case, args, Path(folder) / "model")
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
