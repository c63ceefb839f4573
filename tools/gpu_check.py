"""Check on one CUDA device what the tests check on CPU: numbers, and then memory and speed.

    python tools/gpu_check.py --out gpu_check.json

Needs no network and no checkpoint: models with random weights are written to a temporary folder.
Each check gives numbers and says whether they are within its tolerance; one that fails or raises
does not stop the others. Prints a table, writes a JSON file, exits with 1 if a check failed.
`--device cpu` runs the same code on small sizes: it tests this script, and no speed. What the
checks mean, and what of the package has run on CUDA so far: docs/gpu.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from mcore_rl.algorithms.losses import PolicyLossConfig
from mcore_rl.algorithms.objective import ObjectiveConfig, resolve_objective
from mcore_rl.algorithms.objectives import PolicyObjective
from mcore_rl.cluster.cluster import Cluster
from mcore_rl.cluster.group import Call, done
from mcore_rl.cluster.placement import colocated
from mcore_rl.config.run import train_layout
from mcore_rl.data.packing import SequenceCount
from mcore_rl.errors import UserError
from mcore_rl.megatron.config import MegatronConfig, OptimConfig
from mcore_rl.metrics import to_floats
from mcore_rl.sockets import Address
from mcore_rl.types import TokenSequence
from mcore_rl.workers.spec import ActorSpec, WorkerSpec

Values = dict[str, Any]

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12}
"""Dense bfloat16 operations per second by part of the device's name, from NVIDIA's data sheets."""


class ToleranceError(Exception):
    """The numbers are there and outside the tolerance."""

    def __init__(self, values: Values, reason: str) -> None:
        super().__init__(reason)
        self.values = values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the checks are."""

    parity_hidden: int
    parity_lengths: tuple[int, ...]
    attention_lengths: tuple[int, ...]
    """Multiples of 4, for context parallelism over two ranks."""
    logprob_vocab: int
    logprob_tokens: int
    logprob_hidden: int
    dense: PreTrainedConfig
    moe: PreTrainedConfig
    step_lengths: tuple[int, ...]
    """Tokens of the sequences of one update."""
    step_micro_batch: int
    """Sequences of a micro-batch."""


def qwen3(**sizes: Any) -> Qwen3Config:
    """Return a Qwen3 config; what is left out is Qwen3-0.6B's."""
    shape = {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    }
    return Qwen3Config(**(shape | sizes))


def qwen3_moe(**sizes: Any) -> Qwen3MoeConfig:
    """Return a small mixture of experts: 1.3 B parameters, of which 0.5 B act on a token."""
    shape = qwen3().to_dict() | {
        "num_hidden_layers": 12,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    }
    shape.pop("model_type", None)
    shape.pop("layer_types", None)
    return Qwen3MoeConfig(**(shape | sizes))


TINY: Any = {
    "vocab_size": 257,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
}
SIZES = {
    "cuda": Sizes(
        parity_hidden=512,
        parity_lengths=(300, 17, 1024, 2, 128, 511),
        attention_lengths=(1024, 4, 2048, 512, 36),
        logprob_vocab=151_936,
        logprob_tokens=8192,
        logprob_hidden=1024,
        dense=qwen3(),
        moe=qwen3_moe(),
        step_lengths=(2048,) * 16,
        step_micro_batch=4,
    ),
    "cpu": Sizes(
        parity_hidden=32,
        parity_lengths=(13, 2, 21, 5),
        attention_lengths=(16, 4, 32, 12),
        logprob_vocab=1000,
        logprob_tokens=64,
        logprob_hidden=32,
        dense=qwen3(**TINY),
        moe=qwen3_moe(**TINY | {"num_experts": 4, "num_experts_per_tok": 2}),
        step_lengths=(32,) * 4,
        step_micro_batch=2,
    ),
}


# ------------------------------------------------------------------ models and workers


def save_random_model(config: PreTrainedConfig, folder: Path, device: torch.device) -> None:
    """Write a model whose every norm counts and whose logits spread over a few units."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" in name:
                param.normal_(1.0, 0.1)
            else:
                param.normal_(0.0, 1.5 * param.shape[-1] ** -0.5)
    model.save_pretrained(folder)


R = TypeVar("R")


class OneWorker:
    """A `WorkerGroup` of this process alone."""

    world_size = 1
    step: int | None = None

    def __init__(self, worker: Any) -> None:
        self.worker = worker

    def submit(self, calls: Mapping[int, Call[R]]) -> dict[int, Future[R]]:
        answers = {
            rank: self.worker.handlers[call.method](*call.args) for rank, call in calls.items()
        }
        return {
            rank: answer if isinstance(answer, Future) else done(answer)
            for rank, answer in answers.items()
        }

    def restart(self, rank: int) -> Future[None]:
        raise AssertionError("the engine is in this process")

    def update_address(self, rank: int) -> Address:
        raise AssertionError("the engine is in this process")

    def interrupt(self) -> None:
        """Nothing is generated."""

    def close(self) -> None:
        self.worker.close()


@contextlib.contextmanager
def running(
    folder: Path, device: torch.device, cut: int, **megatron: Any
) -> Iterator[tuple[Cluster, Any]]:
    """Yield the loop's view of one actor, and its worker.

    Args:
        folder: Hugging Face checkpoint.
        device: where it runs.
        cut: sequences of a micro-batch.
        megatron: settings of `actor.megatron`.
    """
    from mcore_rl.workers.worker import Worker

    cfg = MegatronConfig(**megatron)
    actor = ActorSpec(
        model_path=str(folder),
        megatron=cfg,
        # With epsilon 1 an update is proportional to the gradient, so that comparing weights
        # compares gradients.
        optim=OptimConfig(lr=1e-2, eps=1.0),
        grad_clip=1.0,
        total_steps=10,
        temperature=1.0,
        with_reference=False,
    )
    placement = colocated(train_layout(cfg, 1), 1, engine_size=None)
    worker = Worker(WorkerSpec(placement=placement, actor=actor, engine=None), device)
    group = OneWorker(worker)
    try:
        yield Cluster.of(group, placement, SequenceCount(num_sequences=cut)), worker
    finally:
        group.close()
        del worker, group
        free_memory(device)


def free_memory(device: torch.device) -> None:
    """Give back what deleted models held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def sequences_of(lengths: Sequence[int], vocab_size: int) -> list[TokenSequence]:
    """Return random sequences of which all tokens but the first train, with an advantage each."""
    generator = torch.Generator().manual_seed(1)
    return [
        TokenSequence(
            token_ids=torch.randint(vocab_size, (length,), generator=generator).int().numpy(),
            loss_mask=np.arange(length) > 0,
            advantages=torch.randn(1, generator=generator).repeat(length).numpy(),
        )
        for length in lengths
    ]


def gmpo() -> PolicyObjective:
    """Return the objective of GMPO, as the loop makes it."""
    config = ObjectiveConfig(policy_loss=PolicyLossConfig(loss_mode="geo_mean"))
    return PolicyObjective(spec=resolve_objective(config, 4096), log_entropy=True)


def layers_here(dtype: str) -> list[str]:
    """Return the kinds of layers that can run in this dtype on this machine."""
    from mcore_rl.megatron.block_spec import transformer_impl

    kinds = ["local"]
    with contextlib.suppress(UserError):
        config = MegatronConfig(dtype=dtype, transformer_impl="transformer_engine")
        kinds.append(transformer_impl(config))
    return kinds


# ------------------------------------------------------------------ the checks


def parity_models(sizes: Sizes) -> dict[str, PreTrainedConfig]:
    """Return the models of the checks of numbers, by family."""
    hidden = sizes.parity_hidden
    shape = TINY | {"hidden_size": hidden, "intermediate_size": 2 * hidden}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": hidden}
    return {"dense": qwen3(**shape), "moe": qwen3_moe(**shape | experts)}


def check_attention(sizes: Sizes, device: torch.device) -> Values:
    """The attention kernel against the plain one in float32: values and gradients, bfloat16.

    Whole rows, and one rank's part of a row under context parallelism, where queries and keys
    differ in number and the kernel must align the last ones.
    """
    from mcore_rl.megatron.attention import (
        causal_spans,
        packed_causal_attention,
        packed_flash_attention,
    )

    attend = packed_flash_attention if device.type == "cuda" else packed_causal_attention
    total = sum(sizes.attention_lengths)
    boundaries = [0, *itertools.accumulate(sizes.attention_lengths)]
    values: Values = {}
    for name, (rank, size) in {"whole": (0, 1), "cp2_rank0": (0, 2), "cp2_rank1": (1, 2)}.items():
        torch.manual_seed(2)
        spans = causal_spans(boundaries, rank, size)
        shapes = ((total // size, 16, 64), (total, 8, 64), (total, 8, 64))
        inputs = [torch.randn(shape, device=device).bfloat16() for shape in shapes]
        outward = torch.randn(shapes[0], device=device)
        found, expected = (
            _with_gradients(function, [x.to(dtype) for x in inputs], spans, outward)
            for function, dtype in (
                (attend, torch.bfloat16),
                (packed_causal_attention, torch.float32),
            )
        )
        for part, ours, theirs in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
            values[f"{name}/{part}"] = relative_error(ours, theirs)
    # bfloat16 keeps 8 bits, an error of up to 0.4 percent; observed on CPU 0.4 percent.
    return within(values, 0.02)


def _with_gradients(function: Any, inputs: Any, spans: Any, outward: torch.Tensor) -> list[Any]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, spans, 0.125)
    out.backward(outward.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def check_logits_float32(sizes: Sizes, device: torch.device) -> Values:
    """Hugging Face's and Megatron's logits in float32: largest difference."""
    values: Values = {}
    with tempfile.TemporaryDirectory() as root:
        for family, config in parity_models(sizes).items():
            folder = Path(root) / family
            save_random_model(config, folder, device)
            sequences = sequences_of(sizes.parity_lengths, config.vocab_size)
            expected = hugging_face_logits(folder, sequences, torch.float32, device)
            found = megatron_logits(folder, sequences, device, dtype="float32")
            values[family] = float((found - expected).abs().max())
    # The contract of the tests on CPU; logits are of size up to 6; observed on CPU 4e-6.
    return within(values, 1e-4)


def check_logits_bfloat16(sizes: Sizes, device: torch.device) -> Values:
    """Errors of logits in bfloat16 against Hugging Face's in float32, as multiples of the error
    that Hugging Face makes itself in bfloat16; for every kind of layers that can run here."""
    values: Values = {}
    with tempfile.TemporaryDirectory() as root:
        for family, config in parity_models(sizes).items():
            folder = Path(root) / family
            save_random_model(config, folder, device)
            sequences = sequences_of(sizes.parity_lengths, config.vocab_size)
            exact = hugging_face_logits(folder, sequences, torch.float32, device)
            theirs = hugging_face_logits(folder, sequences, torch.bfloat16, device)
            for kind in layers_here("bfloat16"):
                ours = megatron_logits(
                    folder, sequences, device, dtype="bfloat16", transformer_impl=kind
                )
                # The median, since one token that is routed to another expert is far off.
                errors = [(x - exact).abs().median() for x in (ours, theirs)]
                values[f"{family}/{kind}"] = float(errors[0] / errors[1])
    return within(values, 2.0)


def check_update_on_cpu(sizes: Sizes, device: torch.device) -> Values:
    """One GMPO update in float32 here and in a process without CUDA: metrics and weights."""
    values: Values = {}
    with tempfile.TemporaryDirectory() as root:
        for family, config in parity_models(sizes).items():
            folder, answer = Path(root) / family, Path(root) / f"{family}.pt"
            save_random_model(config, folder, device)
            program = [sys.executable, __file__, "--device", device.type]
            subprocess.run(
                [*program, "--one-update", str(folder), "--out", str(answer)],
                check=True,
                timeout=300,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            )
            there: Any = torch.load(answer, weights_only=True)
            here = one_update(folder, sizes, device)
            for key in ("actor/pg_loss", "actor/grad_norm"):
                difference = abs(here["metrics"][key] - there["metrics"][key])
                values[f"{family}/{key}"] = difference / max(1.0, abs(there["metrics"][key]))
            moved = max(
                relative_error(here["moved"][name], there["moved"][name]) for name in there["moved"]
            )
            values[f"{family}/weights_moved"] = moved
    # float32 sums in another order; between layouts on CPU metrics differ by 1e-6 and what a
    # weight moved by up to 1e-4 of it.
    return within(values, 1e-3)


def one_update(folder: Path, sizes: Sizes, device: torch.device) -> Values:
    """Return the metrics of one GMPO update and how far it moved every weight, on the host."""
    with running(folder, device, 2, dtype="float32") as (cluster, worker):
        before = exported(worker)
        vocab_size = int(before["model.embed_tokens.weight"].shape[0])
        cluster.trainer.begin_step()
        sequences = sequences_of(sizes.parity_lengths, vocab_size)
        metrics = to_floats(cluster.trainer.update(sequences, gmpo()))
        after = exported(worker)
    return {"metrics": metrics, "moved": {name: after[name] - before[name] for name in before}}


def exported(worker: Any) -> dict[str, torch.Tensor]:
    """Return every weight by its Hugging Face name, float32 on the host."""
    return {
        name: tensor.to("cpu", torch.float32, copy=True)
        for bucket in worker.actor.exporter
        for name, tensor in bucket
    }


def check_packing(sizes: Sizes, device: torch.device) -> Values:
    """Logprobs in bfloat16 of sequences in one packed row, and of each in a row of its own."""
    values: Values = {}
    with tempfile.TemporaryDirectory() as root:
        config = parity_models(sizes)["dense"]
        save_random_model(config, Path(root), device)
        sequences = sequences_of(sizes.parity_lengths, config.vocab_size)
        for kind in layers_here("bfloat16"):
            packed, alone = (
                flat_logprobs(Path(root), sequences, device, cut, kind)
                for cut in (len(sequences), 1)
            )
            values[f"{kind}/mean_abs_diff"] = float((packed - alone).abs().mean())
    # Matrix products of other sizes round otherwise: steps of bfloat16 on logits of size 1 to 8.
    return within(values, 0.02)


def flat_logprobs(
    folder: Path, sequences: Any, device: torch.device, cut: int, kind: str
) -> torch.Tensor:
    """Return the logprobs of all tokens, with `cut` sequences in a row."""
    with running(folder, device, cut, dtype="bfloat16", transformer_impl=kind) as (cluster, _):
        lists = cluster.trainer.logprobs(sequences)
    return torch.tensor([value for values in lists for value in values])


def check_logprob_memory(sizes: Sizes, device: torch.device) -> Values:
    """Forward and backward of the logprobs of a large vocabulary, blocked and in one piece."""
    from mcore_rl.megatron.logprobs import logprobs_reference, vocab_parallel_logprobs

    torch.manual_seed(3)
    tokens, hidden, vocab = sizes.logprob_tokens, sizes.logprob_hidden, sizes.logprob_vocab
    hidden_TH = torch.randn(tokens, hidden, device=device).bfloat16()
    weight_VH = (torch.randn(vocab, hidden, device=device) * hidden**-0.5).bfloat16()
    labels_T = torch.randint(vocab, (tokens,), device=device)

    def blocked(hidden_TH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        return vocab_parallel_logprobs(
            hidden_TH,
            weight_VH,
            labels_T,
            temperature=1.0,
            vocab_size=vocab,
            group=None,
            with_entropy=False,
        )[0]

    def naive(hidden_TH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        return logprobs_reference(hidden_TH, weight_VH, labels_T, 1.0)[0]

    values: Values = {}
    results = []
    for name, function in (("blocked", blocked), ("naive", naive)):
        leaves = [x.clone().requires_grad_() for x in (hidden_TH, weight_VH)]
        try:
            function(*leaves).sum().backward()  # the first call also chooses kernels
            free_memory(device)
            held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            start = now(device)
            logprobs_T = function(*leaves)
            logprobs_T.sum().backward()
            values[f"{name}/seconds"] = now(device) - start
        except torch.cuda.OutOfMemoryError:
            values[f"{name}/out_of_memory"] = True
            continue
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() - held
            values[f"{name}/peak_gib"] = peak / 2**30
        results.append(logprobs_T.detach())
    if len(results) == 2:
        # The same matrix product in bfloat16, cut otherwise.
        values["max_abs_diff"] = float((results[0] - results[1]).abs().max())
        within({"max_abs_diff": values["max_abs_diff"]}, 0.05, values)
    if "naive/peak_gib" in values:
        share = values["blocked/peak_gib"] / values["naive/peak_gib"]
        within({"share of the naive peak": share}, 0.25, values)
    return values


def check_step_dense(sizes: Sizes, device: torch.device) -> Values:
    """Speed of updates of a dense model, Qwen3-0.6B's shape on CUDA."""
    return training_speed(sizes.dense, sizes, device)


def check_step_moe(sizes: Sizes, device: torch.device) -> Values:
    """Speed of updates of a small mixture of experts."""
    return training_speed(sizes.moe, sizes, device)


def training_speed(config: PreTrainedConfig, sizes: Sizes, device: torch.device) -> Values:
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
            values: Values = {"tokens_per_s": tokens / min(seconds[1:]), "grad_norms": norms}
            if device.type == "cuda":
                values["memory_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    flops = training_flops(config, sizes.step_lengths)
    values["model_tflops"] = flops / min(seconds[1:]) / 1e12
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    if peak:
        values["mfu"] = values["model_tflops"] * 1e12 / peak
    if not all(0 < norm < float("inf") for norm in norms):
        raise ToleranceError(values, "a gradient norm is 0 or not finite")
    return values


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


CHECKS: dict[str, Callable[[Sizes, torch.device], Values]] = {
    "attention": check_attention,
    "logits float32": check_logits_float32,
    "logits bfloat16": check_logits_bfloat16,
    "update on CPU": check_update_on_cpu,
    "packing": check_packing,
    "logprob memory": check_logprob_memory,
    "step dense": check_step_dense,
    "step moe": check_step_moe,
}


# ------------------------------------------------------------------ what checks are made of


def within(values: Values, limit: float, report: Values | None = None) -> Values:
    """Return the numbers if none is above `limit` (or not a number), with the limit among them.

    Raises:
        ToleranceError: otherwise, with `report`, the numbers themselves if it is None.
    """
    shown = report if report is not None else values | {"limit": limit}
    above = {name: value for name, value in values.items() if not value <= limit}
    if above:
        reason = ", ".join(f"{name} is {value:.3g}" for name, value in above.items())
        raise ToleranceError(shown, f"{reason}, at most {limit:g} allowed")
    return shown


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    found, expected = found.float(), expected.float()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def now(device: torch.device) -> float:
    """Return seconds of a clock, all work of the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


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


def run_check(name: str, sizes: Sizes, device: torch.device) -> Values:
    """Run one check and return its row: name, status, seconds, values, reason."""
    start = time.perf_counter()
    status, values, reason = "passed", {}, ""
    try:
        values = CHECKS[name](sizes, device)
    except ToleranceError as failure:
        status, values, reason = "FAILED", failure.values, str(failure)
    except Exception as error:  # noqa: BLE001 - the other checks are to run
        status, reason = "FAILED", f"{type(error).__name__}: {error}"
        traceback.print_exc()
    free_memory(device)
    seconds = round(time.perf_counter() - start, 1)
    return {"check": name, "status": status, "seconds": seconds, "values": values, "reason": reason}


def versions() -> dict[str, str | None]:
    """Return the versions of what the results depend on; None for what is not installed."""

    def of(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = ("torch", "megatron-core", "transformers", "transformer-engine", "apex", "mcore-rl")
    return {"python": platform.python_version(), "cuda": torch.version.cuda} | {
        package: of(package) for package in packages
    }


def join(device: torch.device) -> None:
    """Create a default process group of this process alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=address, rank=0, world_size=1)


def print_row(row: Values) -> None:
    """Print one line of the table."""
    numbers = ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row["values"].items()
    )
    print(f"{row['check']:<16} {row['status']:<7} {row['seconds']:>6.1f} s  {numbers}")
    if row["reason"]:
        print(f"{'':<16} {row['reason']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--only", choices=CHECKS, nargs="*", help="run these checks only")
    parser.add_argument("--one-update", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = SIZES[args.device]
    on_cpu = args.device == "cpu" or args.one_update is not None
    if not on_cpu and not torch.cuda.is_available():
        print("torch sees no CUDA device; --device cpu runs the script on small sizes instead")
        return 2
    device = torch.device("cpu") if on_cpu else torch.device("cuda", 0)
    if not on_cpu:
        torch.cuda.set_device(device)
    join(device)
    if args.one_update is not None:  # the process without CUDA of check_update_on_cpu
        torch.save(one_update(args.one_update, sizes, device), args.out)
        dist.destroy_process_group()
        return 0
    name = platform.machine() if on_cpu else torch.cuda.get_device_name(device)
    print(f"{name}: {', '.join(f'{k} {v}' for k, v in versions().items() if v)}", flush=True)
    rows = []
    for check in args.only or CHECKS:
        rows.append(run_check(check, sizes, device))
        print_row(rows[-1])
        sys.stdout.flush()
    dist.destroy_process_group()
    result = {
        "device": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "checks": rows,
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    failed = [row["check"] for row in rows if row["status"] == "FAILED"]
    print(f"{len(rows) - len(failed)} of {len(rows)} checks passed; written to {args.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
