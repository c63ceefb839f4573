"""How long a step would take, from formulas: good enough to rank layouts, not to predict hours.

A step is the sum of its stages, as the on-policy loop does them one after the other. Matrix
products run at a share of the device's peak, weights and caches are read at a share of its
bandwidth, bytes between devices travel at a share of the link's, and none of the three hides
another. Not counted: rewards, checkpoints, imbalance of experts, kernel launches (but for a latency
per collective of an engine).

Decoding reads the weights once per token of all running sequences, and each sequence's cache (Pope
et al., arXiv:2211.05102, section 2.1); what training exchanges is counted after Narayanan et al.,
arXiv:2104.04473, section 3, with sequence parallelism after Korthikanti et al., arXiv:2205.05198.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mcore_rl.cluster.placement import expert_dp_size
from mcore_rl.dtypes import BYTES
from mcore_rl.plan.memory import GRADIENT_BYTES
from mcore_rl.plan.parameters import StageParameters
from mcore_rl.types import Layout

COMPUTE_SHARE = 0.5
"""Of the peak in training and prefill. Megatron-LM's README reports 41 to 48 percent on H100, with
the communication that is counted apart here."""
BANDWIDTH_SHARE = 0.7
"""Of a device's memory bandwidth in decoding. Assumed."""
LINK_SHARE = 0.7
"""Of a link's bandwidth in large collectives. Assumed."""
COLLECTIVE_S = 15e-6
"""A small all-reduce within a node, two per layer and token of an engine of several devices.
Assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What the devices can do; the flags of `mcore-rl plan --suggest`. Defaults: an H100 SXM in a
    node of eight (NVIDIA's data sheet), 400 Gbit/s of network for each device."""

    tflops: float = 989.0
    """Dense bfloat16 products, 1e12 a second."""
    memory_tb_s: float = 3.35
    """Memory of the device, 1e12 bytes a second."""
    link_gb_s: float = 450.0
    """To other devices of the node, one way, 1e9 bytes a second."""
    network_gb_s: float = 50.0
    """To devices of other nodes."""
    host_gb_s: float = 50.0
    """To host memory (PCIe 5 x16 has 64)."""

    @property
    def compute(self) -> float:
        return self.tflops * 1e12 * COMPUTE_SHARE

    @property
    def memory(self) -> float:
        return self.memory_tb_s * 1e12 * BANDWIDTH_SHARE

    @property
    def host(self) -> float:
        return self.host_gb_s * 1e9 * LINK_SHARE

    def between(self, group: int, devices_per_node: int) -> float:
        """Return the bytes a second of a collective over so many neighbouring devices."""
        is_near = group <= devices_per_node
        return (self.link_gb_s if is_near else self.network_gb_s) * 1e9 * LINK_SHARE


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Sizes of a model that determine times."""

    arch: Mapping[str, Any]
    total: int
    experts: int
    """Parameters of all experts, of `total`."""
    vocab: int
    """Parameters of the embedding."""

    @property
    def expert_share(self) -> float:
        """Share of the experts that a token passes."""
        num_experts = self.arch.get("num_moe_experts")
        return self.arch["moe_router_topk"] / num_experts if num_experts else 0.0

    @property
    def active(self) -> float:
        """Parameters that multiply a token: looking up an embedding is no product."""
        return self.total - self.vocab - self.experts * (1 - self.expert_share)

    @property
    def num_moe_layers(self) -> int:
        return sum(self.arch.get("moe_layer_freq", ()))

    def forward_flops(self, tokens: float, squares: float) -> float:
        """Return the operations of one pass over sequences; attention is causal.

        Args:
            tokens: of all of them.
            squares: sum of the squares of their lengths.
        """
        arch = self.arch
        dims = arch["kv_channels"] + arch.get("v_head_dim", arch["kv_channels"])
        attention = arch["num_layers"] * arch["num_attention_heads"] * dims
        return 2 * self.active * tokens + attention * squares


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The work of a step."""

    prompts: int
    prompt_tokens: int
    """Of all prompts, each once."""
    prompt_squares: int
    samples: int
    response_tokens: int
    longest_response: int
    tokens: int
    """Of all samples, prompts included."""
    squares: int
    longest: int
    """Tokens of the longest sample."""
    updates: int
    """Of an epoch."""
    epochs: int
    passes: int
    """Without gradients, of the actor's size: old and reference log-probabilities, values."""
    trained: int
    """Models that train: 1, with a critic 2."""

    @classmethod
    def of(
        cls,
        prompts: Sequence[int],
        responses: Sequence[int],
        *,
        updates: int = 1,
        epochs: int = 1,
        passes: int = 0,
        trained: int = 1,
    ) -> Work:
        """Return the work of a step.

        Args:
            prompts: tokens of each.
            responses: tokens of each, prompt by prompt.
            updates: of an epoch.
            epochs: over the samples.
            passes: without gradients.
            trained: models.
        """
        n = len(responses) // len(prompts)
        lengths = [prompts[i // n] + response for i, response in enumerate(responses)]
        return cls(
            prompts=len(prompts),
            prompt_tokens=sum(prompts),
            prompt_squares=sum(length**2 for length in prompts),
            samples=len(responses),
            response_tokens=sum(responses),
            longest_response=max(responses),
            tokens=sum(lengths),
            squares=sum(length**2 for length in lengths),
            longest=max(lengths),
            updates=updates,
            epochs=epochs,
            passes=passes,
            trained=trained,
        )

    @property
    def mean(self) -> float:
        """Tokens of a sample in the mean."""
        return self.tokens / self.samples


def decode_time(
    model: Model,
    work: Work,
    speeds: Speeds,
    *,
    engine: int,
    num_engines: int,
    sequences: int,
    kv_bytes: int,
    dtype: str,
) -> float:
    """Return the seconds in which all engines answer.

    Args:
        model: that generates.
        work: of the step.
        speeds: of the devices.
        engine: devices of one engine, of one node.
        num_engines: that share the samples.
        sequences: that one engine runs at a time at most.
        kv_bytes: cache of one token on one device.
        dtype: of the weights.
    """
    per_engine = math.ceil(work.samples / num_engines)
    running = min(per_engine, sequences)
    response = work.response_tokens / work.samples
    rounds = max(work.longest_response, per_engine * response / running)
    # Each of many sequences picks its experts: the share picked by any of them is read.
    read = 1 - (1 - model.expert_share) ** running
    dense = model.total - model.vocab - model.experts
    weights = (dense + model.experts * read) * BYTES[dtype] / engine
    cache = running * (work.mean - response / 2) * kv_bytes
    compute = 2 * model.active * running / engine / speeds.compute
    layers, hidden = model.arch["num_layers"], model.arch["hidden_size"]
    exchange = 0.0
    if engine > 1:
        size = 2 * (engine - 1) / engine * running * hidden * BYTES[dtype]
        exchange = 2 * layers * (size / speeds.between(engine, engine) + COLLECTIVE_S)
    decode = rounds * (max((weights + cache) / speeds.memory, compute) + exchange)
    prefill = model.forward_flops(work.prompt_tokens, work.prompt_squares)
    return decode + prefill / (num_engines * engine) / speeds.compute


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """How a model is laid out for training."""

    layout: Layout
    devices_per_node: int
    stages: Sequence[StageParameters]
    optimizer_bytes: int
    """Of the fullest device."""
    budget: int
    """Tokens of a micro-batch."""
    recomputes: bool
    adapters_only: bool
    dtype: str


def forward_time(model: Model, work: Work, speeds: Speeds, trainer: Trainer) -> float:
    """Return the seconds of a pass over all samples without gradients."""
    return _pass_time(model, work, speeds, trainer, num_parts=1, products=1, exchanges=1)


def train_time(model: Model, work: Work, speeds: Speeds, trainer: Trainer) -> float:
    """Return the seconds of an epoch of updates.

    A backward pass is two products for each forward one, one where weights are frozen; a layer that
    is computed again is one more.
    """
    again = 1 if trainer.recomputes else 0
    products = (2 if trainer.adapters_only else 3) + again
    time = _pass_time(
        model,
        work,
        speeds,
        trainer,
        num_parts=work.updates,
        products=products,
        exchanges=2 + again,
    )
    return time + work.updates * update_time(speeds, trainer)


def update_time(speeds: Speeds, trainer: Trainer) -> float:
    """Return the seconds of reducing gradients, the optimizer, and gathering weights."""
    layout = trainer.layout
    copies = (layout.dp * layout.cp, expert_dp_size(layout))
    spread = layout.world_size // layout.pp
    speed = speeds.between(spread, trainer.devices_per_node)
    size = GRADIENT_BYTES + BYTES[trainer.dtype]
    exchange = max(
        sum(
            count * size * (n - 1) / n
            for count, n in zip((stage.dense, stage.experts), copies, strict=True)
        )
        for stage in trainer.stages
    )
    return exchange / speed + 2 * trainer.optimizer_bytes / speeds.memory


def _pass_time(
    model: Model,
    work: Work,
    speeds: Speeds,
    trainer: Trainer,
    *,
    num_parts: int,
    products: int,
    exchanges: int,
) -> float:
    """Return the seconds of passes over all sequences, in so many parts one after the other."""
    layout = trainer.layout
    compute = (
        products
        * model.forward_flops(work.tokens, work.squares)
        / layout.world_size
        / speeds.compute
    )
    per_rank = work.tokens / layout.dp
    exchange = exchanges * _exchange_time(model, per_rank / layout.cp, speeds, trainer)
    # Each part fills and drains the pipeline once.
    micro_batches = max(1, math.ceil(per_rank / num_parts / trainer.budget))
    bubble = (layout.pp - 1) / (layout.vpp * micro_batches)
    return (compute + exchange) * (1 + bubble)


def _exchange_time(model: Model, tokens: float, speeds: Speeds, trainer: Trainer) -> float:
    """Return the seconds in which a device exchanges what a forward pass needs.

    Args:
        model: its sizes.
        tokens: that pass this device's tensor-parallel group.
        speeds: of the links.
        trainer: the layout.
    """
    layout, arch, per_node = trainer.layout, model.arch, trainer.devices_per_node
    layers, moe_layers = arch["num_layers"] / layout.pp, model.num_moe_layers / layout.pp
    row = arch["hidden_size"] * BYTES[trainer.dtype]
    tp, cp, ep, etp = layout.tp, layout.cp, layout.ep, layout.etp
    time = 0.0
    if tp > 1:  # gathered and scattered around attention and MLP; around experts rows travel
        size = tokens * row * (tp - 1) / tp * (4 * layers - 2 * moe_layers)
        time += size / speeds.between(tp, per_node)
    if cp > 1:
        keys = 2 * max(arch["num_query_groups"] / tp, 1) * arch["kv_channels"]
        size = tokens * keys * BYTES[trainer.dtype] * (cp - 1) * layers
        time += size / speeds.between(tp * cp, per_node)
    if moe_layers:
        rows = tokens / tp * arch["moe_router_topk"] * row * moe_layers
        near = min(1.0, per_node / (ep * etp))
        sent = 2 * rows * (ep - 1) / ep
        time += sent * (1 - near) / speeds.between(per_node + 1, per_node)
        time += (sent * near + 2 * rows * (etp - 1)) / speeds.between(1, per_node)
    return time


def sync_time(
    model: Model, speeds: Speeds, trainer: Trainer, *, is_apart: bool, dtype: str
) -> float:
    """Return the seconds in which engines get all weights: the trainer's devices gather them, and
    send them on where engines have devices of their own."""
    size = model.total * BYTES[trainer.dtype]
    per_node = trainer.devices_per_node
    gather = size / speeds.between(trainer.layout.world_size, per_node)
    if trainer.layout.world_size == 1:
        gather = size / speeds.memory
    far = model.total * BYTES[dtype] / speeds.between(per_node + 1, per_node)
    return gather + (far if is_apart else 0.0)
