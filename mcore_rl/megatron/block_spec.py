"""Layer specs: which modules Megatron builds a decoder layer of.

Two kinds. The local spec needs neither Transformer Engine nor CUDA: Megatron's own linear layers
with this package's attention and norm. Transformer Engine's spec is Megatron's. Both hold the same
weights; Transformer Engine's modules fuse norms into linear layers and hold the experts of a rank
in one module, so some parameters are called otherwise: `canonical_parameter_name` gives the name
they have in the local spec, which is the one used everywhere else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from mcore_rl.errors import require
from mcore_rl.megatron.attention import PackedAttention
from mcore_rl.megatron.config import MegatronConfig
from mcore_rl.megatron.experts import GroupedExperts
from mcore_rl.megatron.swiglu import SwiGLU
from mcore_rl.megatron.versions import with_experts
from mcore_rl.models.spec import QkNorm


def transformer_impl(cfg: MegatronConfig) -> str:
    """Return "local" or "transformer_engine", what `actor.megatron.transformer_impl` means here.

    Raises:
        UserError: if Transformer Engine is asked for where it cannot run.
    """
    can_run = HAVE_TE and torch.cuda.is_available()
    if cfg.transformer_impl == "auto":
        return "transformer_engine" if can_run and cfg.dtype == "bfloat16" else "local"
    require(
        can_run or cfg.transformer_impl == "local",
        "actor.megatron.transformer_impl",
        cfg.transformer_impl,
        "needs a CUDA device and the package transformer-engine, and one of them is not here",
        "Use auto or local.",
    )
    return cfg.transformer_impl


def block_spec(
    config: TransformerConfig,
    moe_layers: Sequence[int],
    vp_stage: int | None = None,
    qk_norm: QkNorm = "none",
) -> TransformerBlockSubmodules:
    """Return the layer specs of this pipeline stage, of the kind that the config names.

    Args:
        config: Megatron's model config.
        moe_layers: 1 for each layer of the whole model whose MLP is a mixture of experts, else 0.
        vp_stage: virtual pipeline stage, None without one.
        qk_norm: of the family. Of norms of each head the config says it too (`qk_layernorm`).
    """
    if config.transformer_impl == "transformer_engine":
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    else:
        spec = local_block_spec(config, moe_layers, vp_stage)
    for layer in spec.layer_specs or ():
        attention: Any = layer.submodules.self_attention  # pyright: ignore
        if attention.module is MLASelfAttention:  # Transformer Engine's spec names it
            attention.module = LatentAttention
        if qk_norm == "whole":
            attention.module = WholeNormAttention
    return spec


_FUSED_NAMES = (
    (r"\.self_attention\.linear_qkv\.layer_norm_(\w+)$", r".input_layernorm.\1"),
    (
        r"\.self_attention\.linear_(q|kv)_up_proj\.layer_norm_(\w+)$",
        r".self_attention.\1_layernorm.\2",
    ),
    (r"\.mlp\.linear_fc1\.layer_norm_(\w+)$", r".pre_mlp_layernorm.\1"),
    (r"\.experts\.(linear_fc[12])\.([a-z]+)(\d+)$", r".experts.local_experts.\3.\1.\2"),
)


def canonical_parameter_name(name: str) -> str:
    """Return the local spec's name of a parameter of either spec.

    Examples:
        self_attention.linear_qkv.layer_norm_weight -> input_layernorm.weight
        mlp.linear_fc1.layer_norm_weight            -> pre_mlp_layernorm.weight
        mlp.experts.linear_fc1.weight3              -> mlp.experts.local_experts.3.linear_fc1.weight
    """
    for pattern, replacement in _FUSED_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the mark by which Megatron sums its gradient under sequence
    parallelism (finalize_model_grads.py:354); torch_norm.py:33 refuses that case."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore


class WholeNorm(torch.nn.Module):
    """RMSNorm over all heads of a token together, of which every tensor-parallel rank has a part.

    Args:
        config: Megatron's.
        hidden_size: of one head.
        eps: added to the mean square.
        num_heads: of all ranks.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, num_heads: int
    ) -> None:
        super().__init__()
        self.eps, self.size = eps, num_heads * hidden_size
        self.group: Any = get_tensor_model_parallel_group()
        size = self.size // self.group.size()
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, heads: Tensor) -> Tensor:
        """Return the normalized heads, [S, B, heads of this rank, head size]."""
        exact = heads.float()
        squares = exact.square().sum((-2, -1), keepdim=True)
        if self.group.size() > 1:
            squares = reduce_from_tensor_model_parallel_region(squares, group=self.group)
            # Every rank normalizes by the sum, so its gradient comes from all of them.
            squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        normalized = exact * torch.rsqrt(squares / self.size + self.eps)
        return (normalized.to(heads.dtype).flatten(-2) * self.weight).view_as(heads)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> ShardedStateDict:
        """Return the weight as what it is, a part of a larger one."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


class WholeNormAttention(SelfAttention):
    """Attention whose queries are normalized over all heads of a token, and keys too."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        size, eps = self.hidden_size_per_attention_head, config.layernorm_epsilon
        self.q_layernorm = WholeNorm(config, size, eps, config.num_attention_heads)
        groups: Any = config.num_query_groups  # never None: the family sets it
        self.k_layernorm = WholeNorm(config, size, eps, groups)


class LatentAttention(MLASelfAttention):
    """Latent attention of the modules that its spec names.

    Megatron 0.19 exchanges some of them: queries that are not compressed get a norm, which no
    model has (mla_qk_norm_config.py, _resolve_mla_qk_layernorm). Before it, this is not called.
    """

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")
        return {name: getattr(submodules, name) for name in (*names, "q_layernorm", "kv_layernorm")}


class LocalSpec(LocalSpecProvider):
    """Megatron's local modules with this package's norm, attention, SwiGLU and experts."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, **_: Any) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return PackedAttention

    def activation_func(self) -> type:
        return SwiGLU

    def grouped_mlp_modules(self, *args: Any, **kwargs: Any) -> Any:
        found: Any = super().grouped_mlp_modules(*args, **kwargs)
        return with_experts(found, GroupedExperts)


def local_block_spec(
    config: TransformerConfig, moe_layers: Sequence[int], vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Return the layer specs of this pipeline stage without Transformer Engine.

    Args:
        config: Megatron's model config.
        moe_layers: 1 for each layer of the whole model whose MLP is a mixture of experts, else 0.
        vp_stage: virtual pipeline stage, None without one.
    """
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    layers = [_layer_spec(config, bool(is_moe)) for is_moe in moe_layers[first : first + count]]
    final_norm: Any = RMSNorm  # a class where the annotation says module
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm)


def _layer_spec(config: TransformerConfig, is_moe: bool) -> ModuleSpec:
    bias_dropout_add: Any = get_bias_dropout_add  # a function where the annotation says type
    backend = LocalSpec()
    is_latent = config.multi_latent_attention
    attention = _latent_attention_spec(backend) if is_latent else _attention_spec(config, backend)
    mlp = get_mlp_module_spec_for_backend(
        backend=backend,
        num_experts=config.num_moe_experts if is_moe else None,
        moe_grouped_gemm=False,
        use_te_activation_func=config.use_te_activation_func,
    )
    # Transformer Engine's names, so that checkpoints written with and without it interchange;
    # its MoE layers keep pre_mlp_layernorm apart, latent attention input_layernorm.
    if is_latent:
        names = {
            "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
            "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
        }
    else:
        names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not is_moe:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.layer_norm(),
            self_attention=attention,
            self_attn_bda=bias_dropout_add,
            pre_mlp_layernorm=backend.layer_norm(),
            mlp=mlp,
            mlp_bda=bias_dropout_add,
            sharded_state_dict_keys_map=names,
        ),
    )


def _attention_spec(config: TransformerConfig, backend: LocalSpec) -> ModuleSpec:
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def _latent_attention_spec(backend: LocalSpec) -> ModuleSpec:
    # The module takes the names that it can import for an installed Transformer Engine, and then
    # fails on one that is None (multi_latent_attention.py:51, 185).
    multi_latent_attention.HAVE_TE = HAVE_TE
    # 0.19 compares with this class, and has its name only beside Transformer Engine (:69).
    multi_latent_attention.Linear = Linear  # pyright: ignore[reportAttributeAccessIssue]
    column = backend.column_parallel_linear()
    rms_norm: Any = RMSNorm  # a class where the annotation says ModuleSpec
    return ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=column,
            # Whole on every tensor-parallel rank, as under Transformer Engine. Column-parallel
            # ones, which Megatron has in its local spec, are wrong: the key that all heads share
            # gets on each rank the gradient of that rank's heads only.
            linear_q_down_proj=Linear,
            linear_q_up_proj=column,
            linear_kv_down_proj=Linear,
            linear_kv_up_proj=column,
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=rms_norm,
            kv_layernorm=rms_norm,
        ),
    )
