"""Qwen3-MoE: Qwen3's attention; experts in place of the MLP in all or some of the layers."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mcore_rl.models.decoder import dense_mlp_entries, moe_entries
from mcore_rl.models.mappings import ParamEntry
from mcore_rl.models.qwen3 import Qwen3
from mcore_rl.models.spec import MODEL_FAMILIES, require_field


class Qwen3Moe(Qwen3):
    def check(self, config: PreTrainedConfig) -> None:
        super().check(config)
        require_field(
            any(_is_moe(config, layer) for layer in range(config.num_hidden_layers)),
            "mlp_only_layers",
            config.mlp_only_layers,
            "and decoder_sparse_step leave no layer with experts",
        )
        # Renormalized over a single expert its weight is 1 and the router gets no gradient, so
        # TransformerConfig.__post_init__ refuses it.
        require_field(
            config.num_experts_per_tok > 1 or not config.norm_topk_prob,
            "num_experts_per_tok",
            config.num_experts_per_tok,
            "needs norm_topk_prob=false",
        )

    def transformer_kwargs(self, config: PreTrainedConfig) -> dict[str, Any]:
        return super().transformer_kwargs(config) | {
            "num_moe_experts": config.num_experts,
            "moe_ffn_hidden_size": config.moe_intermediate_size,
            "moe_layer_freq": [
                int(_is_moe(config, layer)) for layer in range(config.num_hidden_layers)
            ],
            "moe_router_topk": config.num_experts_per_tok,
            "moe_router_score_function": "softmax",
            # A softmax over the chosen logits is the softmax over all of them renormalized, so
            # norm_topk_prob is "softmax after top-k".
            "moe_router_pre_softmax": not config.norm_topk_prob,
            # RL optimizes its own objective; router_aux_loss_coef belongs to pretraining.
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
        }

    def mlp_entries(self, config: PreTrainedConfig, layer: int) -> list[ParamEntry]:
        if not _is_moe(config, layer):
            return dense_mlp_entries(config, layer)
        return moe_entries(
            config,
            layer,
            num_experts=config.num_experts,
            expert_size=config.moe_intermediate_size,
        )


def _is_moe(config: PreTrainedConfig, layer: int) -> bool:
    return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0


MODEL_FAMILIES.add("qwen3_moe", Qwen3Moe())
