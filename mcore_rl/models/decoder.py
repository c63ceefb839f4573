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
    Column,
    GateUp,
    HfTensor,
    ParamEntry,
    ParamMapping,
    Qkv,
    Replicated,
    Row,
)
from mcore_rl.models.rope import check_rope, gpt_rope_kwargs, yarn_config_kwargs
from mcore_rl.models.spec import ModelFamily, QkNorm, require_field


class DecoderFamily(ModelFamily):
    """A decoder whose every layer has the same attention and, unless overridden, a dense MLP."""

    partial_rotary: ClassVar[bool] = False
    """Whether the model may rotate only a part of each head."""

    def has_qkv_bias(self, config: PreTrainedConfig) -> bool:
        """Whether the query, key and value projections have biases."""
        return False

    def check(self, config: PreTrainedConfig) -> None:
        check_rope(config, partial=self.partial_rotary)
        act, dropout = config.hidden_act, config.attention_dropout
        require_field(act == "silu", "hidden_act", act, "is not silu")
        require_field(not dropout, "attention_dropout", dropout, "must be 0: RL runs no dropout")
        window = getattr(config, "sliding_window", None)
        kinds = _attention_kinds(config)
        require_field(
            kinds == {"full_attention"},
            "sliding_window",
            window,
            f"gives layers of type {', '.join(sorted(kinds))}; only full_attention is supported",
        )

    def gpt_kwargs(
        self, config: PreTrainedConfig, tp_size: int, vocab_divisible_by: int = 1
    ) -> dict[str, Any]:
        return super().gpt_kwargs(config, tp_size, vocab_divisible_by) | gpt_rope_kwargs(config)

    def transformer_kwargs(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "ffn_hidden_size": config.intermediate_size,
            "add_bias_linear": False,
            "normalization": "RMSNorm",
            "layernorm_epsilon": config.rms_norm_eps,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            **self.attention_kwargs(config),
        }

    def attention_kwargs(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Return the arguments of TransformerConfig that depend on the kind of attention."""
        return {
            "num_query_groups": config.num_key_value_heads,
            "kv_channels": head_dim(config),
            "add_qkv_bias": self.has_qkv_bias(config),
            # With it Megatron sums gradients of these norms over tensor-parallel ranks
            # (finalize_model_grads.py:354): right where each rank has the whole weight.
            "qk_layernorm": self.qk_norm(config) == "head",
            **yarn_config_kwargs(config),
        }

    def layer_entries(self, config: PreTrainedConfig, layer: int) -> list[ParamEntry]:
        return self.attention_entries(config, layer) + self.mlp_entries(config, layer)

    def attention_entries(self, config: PreTrainedConfig, layer: int) -> list[ParamEntry]:
        """Return the input norm and the attention of one layer."""
        return grouped_query_entries(
            config,
            layer,
            qkv_bias=self.has_qkv_bias(config),
            qk_norm=self.qk_norm(config),
        )

    def mlp_entries(self, config: PreTrainedConfig, layer: int) -> list[ParamEntry]:
        """Return the parameters of the MLP, or of what stands in its place, with its norm."""
        return dense_mlp_entries(config, layer)


def check_no_attention_bias(config: PreTrainedConfig) -> None:
    """Raise a UserError if all four projections of attention are to have biases.

    Megatron puts one on the output projection only together with those of the MLP.
    """
    bias = config.attention_bias
    require_field(not bias, "attention_bias", bias, "is not supported for this family")


def head_dim(config: PreTrainedConfig) -> int:
    """Return the size of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def grouped_query_entries(
    config: PreTrainedConfig, layer: int, *, qkv_bias: bool, qk_norm: QkNorm
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
        "input_layernorm.weight": norm(f"model.layers.{layer}.input_layernorm", config.hidden_size),
        "self_attention.linear_qkv.weight": qkv("weight", config.hidden_size),
    }
    if qkv_bias:
        params["self_attention.linear_qkv.bias"] = qkv("bias")
    if qk_norm == "head":
        params["self_attention.q_layernorm.weight"] = norm(f"{hf}.q_norm", dim)
        params["self_attention.k_layernorm.weight"] = norm(f"{hf}.k_norm", dim)
    elif qk_norm == "whole":
        for part in "qk":
            weight = HfTensor(f"{hf}.{part}_norm.weight", (rows[part],))
            params[f"self_attention.{part}_layernorm.weight"] = Column(weight)
    params["self_attention.linear_proj.weight"] = Row(
        HfTensor(f"{hf}.o_proj.weight", (config.hidden_size, rows["q"]))
    )
    return entries_of_layer(layer, params)


def dense_mlp_entries(config: PreTrainedConfig, layer: int) -> list[ParamEntry]:
    """Return the post-attention norm and the gated MLP of one layer."""
    mlp = gated_mlp(f"model.layers.{layer}.mlp", config.hidden_size, config.intermediate_size)
    params = {f"mlp.{name}": mapping for name, mapping in mlp.items()}
    return entries_of_layer(layer, mlp_norm(config, layer) | params)


def gated_mlp(
    hf: str,
    hidden_size: int,
    ffn_size: int,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> dict[str, ParamMapping]:
    """Return the parameters of one gated MLP by Megatron's name; `names` are Hugging Face's."""
    gate, up, down = names
    return {
        "linear_fc1.weight": GateUp(
            HfTensor(f"{hf}.{gate}.weight", (ffn_size, hidden_size)),
            HfTensor(f"{hf}.{up}.weight", (ffn_size, hidden_size)),
        ),
        "linear_fc2.weight": Row(HfTensor(f"{hf}.{down}.weight", (hidden_size, ffn_size))),
    }


def mlp_norm(config: PreTrainedConfig, layer: int) -> dict[str, ParamMapping]:
    """Return the norm between attention and MLP."""
    hf = f"model.layers.{layer}.post_attention_layernorm"
    return {"pre_mlp_layernorm.weight": norm(hf, config.hidden_size)}


def norm(hf: str, size: int) -> Replicated:
    """Return the mapping of a norm's weight."""
    return Replicated(HfTensor(f"{hf}.weight", (size,)))


def entries_of_layer(
    layer: int, params: dict[str, ParamMapping], expert: int | None = None
) -> list[ParamEntry]:
    """Return entries for parameters named from the layer on: "mlp.linear_fc2.weight"."""
    return [
        ParamEntry(
            megatron_name=f"decoder.layers.{layer}.{name}",
            mapping=mapping,
            layer=layer,
            expert=expert,
        )
        for name, mapping in params.items()
    ]


def _attention_kinds(config: PreTrainedConfig) -> set[str]:
    # transformers sets sliding_window to None or 0 unless use_sliding_window is on; without
    # layer_types it then holds for every layer.
    window = getattr(config, "sliding_window", None)
    everywhere = "sliding_attention" if window else "full_attention"
    return set(getattr(config, "layer_types", None) or [everywhere])
