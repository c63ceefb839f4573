"""Multi-head latent attention (arXiv:2405.04434, section 2.1) for the DeepSeek families.

Queries (where `q_lora_rank` is set) and keys with values come from a compressed vector each. The
projections down to it are whole on every tensor-parallel rank, those up from it are cut by heads.

Megatron, like vLLM, gives the norms of the compressed vectors `rms_norm_eps`; transformers always
gives them 1e-6, so where the field is another (Moonlight: 1e-5) its numbers differ from both;
`reference.py` has it follow them where it is compared with.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mcore_rl.models.decoder import check_no_attention_bias, entries_of_layer, norm
from mcore_rl.models.mappings import Column, HfTensor, ParamEntry, ParamMapping, Replicated, Row
from mcore_rl.models.moe import MoeFamily
from mcore_rl.models.rope import yarn_numbers
from mcore_rl.models.spec import require_field


class LatentAttentionFamily(MoeFamily):
    """Latent attention; leading dense layers, then experts with shared ones beside them."""

    def is_moe(self, config: PreTrainedConfig, layer: int) -> bool:
        return layer >= config.first_k_dense_replace

    def check(self, config: PreTrainedConfig) -> None:
        super().check(config)
        check_no_attention_bias(config)
        rope = config.rope_parameters
        kind = rope["rope_type"]
        require_field(
            kind in ("default", "yarn"),
            "rope_type",
            kind,
            "is neither default nor yarn, which latent attention has in Megatron",
        )
        truncate = rope.get("truncate", True)
        require_field(truncate, "truncate", truncate, "is not supported with latent attention")
        every = getattr(config, "moe_layer_freq", 1)
        require_field(every == 1, "moe_layer_freq", every, "is not 1")

    def attention_kwargs(self, config: PreTrainedConfig) -> dict[str, Any]:
        yarn = config.rope_parameters["rope_type"] == "yarn"
        return {
            "multi_latent_attention": True,
            "num_query_groups": config.num_attention_heads,
            "q_lora_rank": config.q_lora_rank,
            "kv_lora_rank": config.kv_lora_rank,
            "qk_head_dim": config.qk_nope_head_dim,
            "qk_pos_emb_head_dim": config.qk_rope_head_dim,
            "v_head_dim": config.v_head_dim,
            "kv_channels": config.qk_nope_head_dim + config.qk_rope_head_dim,
            "qk_layernorm": True,
            "rotary_base": config.rope_parameters["rope_theta"],
            "rope_type": "yarn" if yarn else "rope",
            **(yarn_numbers(config) if yarn else {}),
        }

    def gpt_kwargs(
        self, config: PreTrainedConfig, tp_size: int, vocab_divisible_by: int = 1
    ) -> dict[str, Any]:
        # GPTModel makes no positions under latent attention, which has its own, unless for yarn.
        return super().gpt_kwargs(config, tp_size, vocab_divisible_by) | {
            "position_embedding_type": "rope"
        }

    def attention_entries(self, config: PreTrainedConfig, layer: int) -> list[ParamEntry]:
        hf = f"model.layers.{layer}"
        hidden_size, heads = config.hidden_size, config.num_attention_heads
        q_rank, kv_rank = config.q_lora_rank, config.kv_lora_rank
        q_rows = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        kv_rows = heads * (config.qk_nope_head_dim + config.v_head_dim)

        def weight(name: str, rows: int, cols: int) -> HfTensor:
            return HfTensor(f"{hf}.self_attn.{name}.weight", (rows, cols))

        queries: dict[str, ParamMapping]
        if q_rank is None:
            queries = {"linear_q_proj.weight": Column(weight("q_proj", q_rows, hidden_size))}
        else:
            queries = {
                "linear_q_down_proj.weight": Replicated(weight("q_a_proj", q_rank, hidden_size)),
                "q_layernorm.weight": norm(f"{hf}.self_attn.q_a_layernorm", q_rank),
                "linear_q_up_proj.weight": Column(weight("q_b_proj", q_rows, q_rank)),
            }
        kv_down = weight("kv_a_proj_with_mqa", kv_rank + config.qk_rope_head_dim, hidden_size)
        attention: dict[str, ParamMapping] = {
            **queries,
            "linear_kv_down_proj.weight": Replicated(kv_down),
            "kv_layernorm.weight": norm(f"{hf}.self_attn.kv_a_layernorm", kv_rank),
            "linear_kv_up_proj.weight": Column(weight("kv_b_proj", kv_rows, kv_rank)),
            "linear_proj.weight": Row(weight("o_proj", hidden_size, heads * config.v_head_dim)),
        }
        return entries_of_layer(
            layer,
            {
                "input_layernorm.weight": norm(f"{hf}.input_layernorm", hidden_size),
                **{f"self_attention.{name}": mapping for name, mapping in attention.items()},
            },
        )
