"""The decoder that most open models share: RMSNorm, rotary attention with query groups, gated MLP.

`DecoderFamily` is the base of the families that are such a decoder; the functions build the
entries of one layer part for any family. Hugging Face names are those of checkpoint files, with
one tensor per expert (`mlp.experts.3.gate_proj.weight`). transformers >= 5 fuses experts in memory
only: `save_pretrained` writes, and `from_pretrained` reads, the per-expert names.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch.nn import functional as F
from transformers import PreTrainedConfig

from mcore_rl.models.mappings import (
    GateUp,
    HfTensor,
    ParamEntry,
    ParamMapping,
    Qkv,
    Replicated,
    Row,
)
from mcore_rl.models.spec import ModelFamily, require_field


class DecoderFamily(ModelFamily):
    """A decoder whose every layer has the same attention and, unless overridden, a dense MLP."""

    qkv_bias: ClassVar[bool] = False
    """Biases on query, key and value projections."""
    qk_norm: ClassVar[bool] = False
    """RMSNorm on each query and key head."""

    def check(self, config: PreTrainedConfig) -> None:
        rope_type = config.rope_parameters["rope_type"]
        rotary_frac = config.rope_parameters.get("partial_rotary_factor", 1.0)
        dropout = config.attention_dropout
        require_field(config.hidden_act == "silu", "hidden_act", config.hidden_act, "is not silu")
        require_field(dropout == 0, "attention_dropout", dropout, "must be 0: RL runs no dropout")
        require_field(rope_type == "default", "rope_type", rope_type, "is not 'default'")
        require_field(rotary_frac == 1, "partial_rotary_factor", rotary_frac, "is not 1")
        require_field(
            _attention_kinds(config) == {"full_attention"},
            "use_sliding_window",
            config.use_sliding_window,
            f"gives layers of type {', '.join(sorted(_attention_kinds(config)))}; "
            "only full_attention is supported",
        )

    def transformer_kwargs(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "num_query_groups": config.num_key_value_heads,
            "kv_channels": head_dim(config),
            "ffn_hidden_size": config.intermediate_size,
            "add_bias_linear": False,
            "add_qkv_bias": self.qkv_bias,
            "qk_layernorm": self.qk_norm,
            "normalization": "RMSNorm",
            "layernorm_epsilon": config.rms_norm_eps,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
        }

    def layer_entries(self, config: PreTrainedConfig, layer: int) -> list[ParamEntry]:
        attention = attention_entries(config, layer, qkv_bias=self.qkv_bias, qk_norm=self.qk_norm)
        return attention + self.mlp_entries(config, layer)

    def mlp_entries(self, config: PreTrainedConfig, layer: int) -> list[ParamEntry]:
        """Return the parameters of the MLP, or of what stands in its place, with its norm."""
        return dense_mlp_entries(config, layer)


def head_dim(config: PreTrainedConfig) -> int:
    """Return the size of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_entries(
    config: PreTrainedConfig, layer: int, *, qkv_bias: bool, qk_norm: bool
) -> list[ParamEntry]:
    """Return the input norm and the grouped-query attention of one layer."""
    hf = f"model.layers.{layer}.self_attn"
    dim = head_dim(config)
    num_groups = config.num_key_value_heads
    rows = {"q": config.num_attention_heads * dim, "k": num_groups * dim, "v": num_groups * dim}

    def qkv(kind: str, *trailing: int) -> Qkv:
        q, k, v = (HfTensor(f"{hf}.{p}_proj.{kind}", (rows[p], *trailing)) for p in "qkv")
        return Qkv(q, k, v, num_groups)

    params: dict[str, ParamMapping] = {
        "input_layernorm.weight": _norm(
            f"model.layers.{layer}.input_layernorm", config.hidden_size
        ),
        "self_attention.linear_qkv.weight": qkv("weight", config.hidden_size),
    }
    if qkv_bias:
        params["self_attention.linear_qkv.bias"] = qkv("bias")
    if qk_norm:
        params["self_attention.q_layernorm.weight"] = _norm(f"{hf}.q_norm", dim)
        params["self_attention.k_layernorm.weight"] = _norm(f"{hf}.k_norm", dim)
    params["self_attention.linear_proj.weight"] = Row(
        HfTensor(f"{hf}.o_proj.weight", (config.hidden_size, rows["q"]))
    )
    return _layer_entries(layer, params)


def dense_mlp_entries(config: PreTrainedConfig, layer: int) -> list[ParamEntry]:
    """Return the post-attention norm and the gated MLP of one layer."""
    mlp = _gated_mlp(f"model.layers.{layer}.mlp", config.hidden_size, config.intermediate_size)
    params = {f"mlp.{name}": mapping for name, mapping in mlp.items()}
    return _layer_entries(layer, _mlp_norm(config, layer) | params)


def moe_entries(
    config: PreTrainedConfig, layer: int, *, num_experts: int, expert_size: int
) -> list[ParamEntry]:
    """Return the post-attention norm, the router and the experts of one layer.

    Args:
        config: gives the hidden size.
        layer: from 0.
        num_experts: routed experts in the layer.
        expert_size: hidden units of one expert.
    """
    hf = f"model.layers.{layer}.mlp"
    router = Replicated(HfTensor(f"{hf}.gate.weight", (num_experts, config.hidden_size)))
    entries = _layer_entries(layer, _mlp_norm(config, layer) | {"mlp.router.weight": router})
    for expert in range(num_experts):
        mlp = _gated_mlp(f"{hf}.experts.{expert}", config.hidden_size, expert_size)
        params = {f"mlp.experts.local_experts.{expert}.{name}": m for name, m in mlp.items()}
        entries += _layer_entries(layer, params, expert)
    return entries


def _attention_kinds(config: PreTrainedConfig) -> set[str]:
    # transformers sets sliding_window to None unless use_sliding_window is on; without layer_types
    # it then holds for every layer.
    everywhere = "full_attention" if config.sliding_window is None else "sliding_attention"
    return set(getattr(config, "layer_types", None) or [everywhere])


def _gated_mlp(hf: str, hidden_size: int, ffn_size: int) -> dict[str, ParamMapping]:
    return {
        "linear_fc1.weight": GateUp(
            HfTensor(f"{hf}.gate_proj.weight", (ffn_size, hidden_size)),
            HfTensor(f"{hf}.up_proj.weight", (ffn_size, hidden_size)),
        ),
        "linear_fc2.weight": Row(HfTensor(f"{hf}.down_proj.weight", (hidden_size, ffn_size))),
    }


def _mlp_norm(config: PreTrainedConfig, layer: int) -> dict[str, ParamMapping]:
    hf = f"model.layers.{layer}.post_attention_layernorm"
    return {"pre_mlp_layernorm.weight": _norm(hf, config.hidden_size)}


def _norm(hf: str, size: int) -> Replicated:
    return Replicated(HfTensor(f"{hf}.weight", (size,)))


def _layer_entries(
    layer: int, params: dict[str, ParamMapping], expert: int | None = None
) -> list[ParamEntry]:
    return [
        ParamEntry(
            megatron_name=f"decoder.layers.{layer}.{name}",
            mapping=mapping,
            layer=layer,
            expert=expert,
        )
        for name, mapping in params.items()
    ]
