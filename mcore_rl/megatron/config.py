"""Config sections of the actor's Megatron side. Imports no Megatron: config parses without it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from mcore_rl.dtypes import DTYPES
from mcore_rl.errors import refuse_unread, require, require_one_of
from mcore_rl.types import Part

ALL_LINEAR = "all-linear"
"""Instead of names of layers: every linear layer of attention, MLPs and experts."""
TRANSFORMER_IMPLS = ("auto", "local", "transformer_engine")


@dataclass(kw_only=True, slots=True)
class RefMegatronConfig:
    """`ref.megatron`: where the frozen copy of the first model is; laid out as the actor."""

    param_offload: bool = False
    """Keep its weights in pinned host memory while they are not read."""


@dataclass(kw_only=True, slots=True)
class OffloadConfig:
    """`critic.megatron`, and the head of `actor.megatron`: what is in pinned host memory while it
    is not needed. Moves change no number; which moments need what: cluster/phases.py."""

    param_offload: bool = False
    """Weights: while engines generate and another model trains."""
    grad_offload: bool = False
    """Gradient buffers: except in updates."""
    optimizer_offload: bool = False
    """Float32 masters and moments: except in updates and checkpoints."""

    @property
    def parts(self) -> frozenset[Part]:
        """What may leave the device."""
        chosen = {
            Part.PARAM: self.param_offload,
            Part.GRAD: self.grad_offload,
            Part.OPTIMIZER: self.optimizer_offload,
        }
        return frozenset(part for part, leaves in chosen.items() if leaves)


@dataclass(kw_only=True, slots=True)
class MegatronConfig(OffloadConfig):
    """`actor.megatron`: parallel layout and what Megatron-Core is told."""

    tensor_model_parallel_size: int = 1
    """Processes that share the matrices of each layer."""
    pipeline_model_parallel_size: int = 1
    """Stages of consecutive layers."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Pieces of the model on each stage, which interleave; None: one."""
    context_parallel_size: int = 1
    """Processes that share the tokens of each sequence."""
    expert_model_parallel_size: int = 1
    """Processes over which the experts of each layer are spread."""
    expert_tensor_parallel_size: int | None = None
    """None: the tensor parallel size."""
    sequence_parallel: bool | None = None
    """None: on when tensor_model_parallel_size > 1."""
    dtype: str = "bfloat16"
    """Type of weights and activations; the optimizer always keeps float32 masters."""
    transformer_impl: str = "auto"
    """local: Megatron's own layers; transformer_engine: those of Transformer Engine, on CUDA in
    bfloat16; auto: Transformer Engine's where they can run."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass goes on."""
    moe_router_freeze: bool = False
    """Leave the routers of a mixture of experts at their initial weights."""
    override_transformer_config: dict[str, Any] = field(default_factory=dict)
    """Fields of Megatron's TransformerConfig, handed on as they are, such as
    recompute_granularity; refused are unknown names, the architecture, which config.json
    decides, and what would change results: see `overrides.py`."""
    seed: int = 42
    """Base of Megatron's random states."""

    def __post_init__(self) -> None:
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
        ):
            size = getattr(self, name)
            is_size = size is None or size >= 1
            require(is_size, f"actor.megatron.{name}", size, "must be at least 1")
        require_one_of("actor.megatron.dtype", self.dtype, DTYPES)
        impl = self.transformer_impl
        require_one_of("actor.megatron.transformer_impl", impl, TRANSFORMER_IMPLS)
        require(
            impl != "transformer_engine" or self.dtype == "bfloat16",
            "actor.megatron.transformer_impl",
            impl,
            f"attends to packed rows in half precision only, not in {self.dtype}",
            "Use local, or actor.megatron.dtype=bfloat16.",
        )

    @property
    def uses_sequence_parallel(self) -> bool:
        if self.sequence_parallel is None:
            return self.tensor_model_parallel_size > 1
        return self.sequence_parallel


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """What `model.lora_rank`, `model.lora_alpha` and `model.target_modules` ask for."""

    rank: int
    """Inner dimension of an adapter."""
    alpha: int
    """Numerator of `scale`."""
    target_modules: tuple[str, ...]
    """Last parts of Hugging Face's names of layers, or ALL_LINEAR alone."""

    @property
    def names(self) -> tuple[str, ...] | None:
        """The names in `target_modules`; None: every linear layer."""
        return None if self.target_modules == (ALL_LINEAR,) else self.target_modules

    @property
    def scale(self) -> float:
        """What the product of the two halves of an adapter is multiplied by."""
        return self.alpha / self.rank


@dataclass(kw_only=True, slots=True)
class RouterReplayConfig:
    """`actor.router_replay`: which experts the routers choose in training."""

    mode: str = "disabled"
    """disabled: the routers choose by themselves; R2: the updates of a step replay what the pass
    for the old log-probabilities chose; R3: that pass and the updates replay what the engine
    chose."""

    def __post_init__(self) -> None:
        require_one_of("actor.router_replay.mode", self.mode, ("disabled", "R2", "R3"))


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """`actor.optim`: AdamW and its learning-rate schedule."""

    SECTION: ClassVar[str] = "actor.optim"

    lr: float = 1e-6
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate of every step after a decaying schedule."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0; step 0 already takes 1/n of it."""
    lr_decay_style: str = "constant"
    """constant, linear or cosine."""
    lr_decay_steps: int | None = None
    """Steps of a decaying schedule, warmup included, before `min_lr`; None: the training's total
    steps."""
    weight_decay: float = 0.01
    """Of AdamW: lr * weight_decay is the share of a weight that each update takes off."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of Adam's running means of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the root of the running mean of squares, by which Adam divides."""

    def __post_init__(self) -> None:
        require(self.lr > 0, f"{self.SECTION}.lr", self.lr, "must be > 0")
        require(
            0 <= self.min_lr <= self.lr,
            f"{self.SECTION}.min_lr",
            self.min_lr,
            f"must lie between 0 and {self.SECTION}.lr",
        )
        require(
            self.lr_warmup_steps >= 0,
            f"{self.SECTION}.lr_warmup_steps",
            self.lr_warmup_steps,
            "must be >= 0",
        )
        require(
            self.weight_decay >= 0,
            f"{self.SECTION}.weight_decay",
            self.weight_decay,
            "must be >= 0",
        )
        steps = self.lr_decay_steps
        is_length = steps is None or steps >= 1
        require(is_length, f"{self.SECTION}.lr_decay_steps", steps, "must be >= 1")
        require(self.eps > 0, f"{self.SECTION}.eps", self.eps, "must be > 0")
        require_one_of(
            f"{self.SECTION}.lr_decay_style", self.lr_decay_style, ("constant", "linear", "cosine")
        )
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            f"{self.SECTION}.betas",
            list(self.betas),
            "must be two numbers in [0, 1)",
        )
        if self.lr_decay_style == "constant":
            choice, unread = "lr_decay_style=constant", ("min_lr", "lr_decay_steps")
            refuse_unread(self, self.SECTION, unread, choice)


@dataclass(kw_only=True, slots=True)
class CriticOptimConfig(OptimConfig):
    """`critic.optim`: as the actor's, with a higher rate: the head begins at nothing."""

    SECTION: ClassVar[str] = "critic.optim"

    lr: float = 1e-5
    """Peak learning rate."""
