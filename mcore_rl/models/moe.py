"""Decoders with experts in place of the MLP in all or some of the layers.

`MoeFamily` makes the entries out of Megatron's own arguments (`moe_kwargs`), so the number of
experts, their sizes and the kinds of gates are said once. How the router weighs its experts is one
function per kind: `softmax_routing`, `sigmoid_routing`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from mcore_rl.models.decoder import (
    DecoderFamily,
    dense_mlp_entries,
    entries_of_layer,
    gated_mlp,
    mlp_norm,
)
from mcore_rl.models.mappings import HfTensor, ParamEntry, ParamMapping, Replicated
from mcore_rl.models.spec import require_field


class MoeFamily(DecoderFamily):
    """A decoder of which some layers, or all, have experts.

    The class variables are Hugging Face's names, after those of Qwen where not overridden.
    """

    hf_block: ClassVar[str] = "mlp"
    """What holds router and experts."""
    hf_expert: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")
    """An expert's gate, up and down projection."""
    hf_shared: ClassVar[str] = "shared_experts"
    """What holds the shared experts, as one MLP."""

    @abstractmethod
    def is_moe(self, config: PreTrainedConfig, layer: int) -> bool:
        """Whether decoder layer `layer`, from 0, has experts."""

    @abstractmethod
    def moe_kwargs(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Return the arguments of TransformerConfig that describe experts and router."""

    def check(self, config: PreTrainedConfig) -> None:
        super().check(config)
        num_layers = config.num_hidden_layers
        require_field(
            any(self.is_moe(config, layer) for layer in range(num_layers)),
            "num_hidden_layers",
            num_layers,
            "are all without experts; mlp_only_layers, decoder_sparse_step or "
            "first_k_dense_replace leave none with them",
        )

    def transformer_kwargs(self, config: PreTrainedConfig) -> dict[str, Any]:
        layers = range(config.num_hidden_layers)
        return {
            **super().transformer_kwargs(config),
            "moe_layer_freq": [int(self.is_moe(config, layer)) for layer in layers],
            **self.moe_kwargs(config),
        }

    def mlp_entries(self, config: PreTrainedConfig, layer: int) -> list[ParamEntry]:
        if not self.is_moe(config, layer):
            return dense_mlp_entries(config, layer)
        moe, hidden_size = self.moe_kwargs(config), config.hidden_size
        num_experts, expert_size = moe["num_moe_experts"], moe["moe_ffn_hidden_size"]
        hf = f"model.layers.{layer}.{self.hf_block}"

        params: dict[str, ParamMapping] = mlp_norm(config, layer)
        router = HfTensor(f"{hf}.gate.weight", (num_experts, hidden_size))
        params["mlp.router.weight"] = Replicated(router)
        if moe.get("moe_router_enable_expert_bias"):
            bias = HfTensor(f"{hf}.gate.e_score_correction_bias", (num_experts,))
            params["mlp.router.expert_bias"] = Replicated(bias)
        if shared_size := moe.get("moe_shared_expert_intermediate_size"):
            shared = gated_mlp(f"{hf}.{self.hf_shared}", hidden_size, shared_size)
            params |= {f"mlp.shared_experts.{name}": m for name, m in shared.items()}
        if moe.get("moe_shared_expert_gate"):
            gate = HfTensor(f"{hf}.{self.hf_shared}_gate.weight", (1, hidden_size))
            params["mlp.shared_experts.gate_weight"] = Replicated(gate)

        entries = entries_of_layer(layer, params)
        for expert in range(num_experts):
            mlp = gated_mlp(f"{hf}.experts.{expert}", hidden_size, expert_size, self.hf_expert)
            of_expert = {f"mlp.experts.local_experts.{expert}.{name}": m for name, m in mlp.items()}
            entries += entries_of_layer(layer, of_expert, expert)
        return entries


def shared_and_routed_sizes(config: PreTrainedConfig) -> dict[str, Any]:
    """Return TransformerConfig's arguments for the sizes of the experts."""
    shared_size = config.n_shared_experts * config.moe_intermediate_size
    return {
        "num_moe_experts": config.n_routed_experts,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": shared_size,
    }


def softmax_routing(*, topk: int, normalized: bool) -> dict[str, Any]:
    """Return the router's arguments for weights that are softmax probabilities of all experts.

    A softmax over the chosen logits is the softmax over all of them renormalized, so `normalized`
    (norm_topk_prob) is Megatron's softmax after top-k.
    """
    return {
        "moe_router_topk": topk,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not normalized,
    }


def check_softmax_routing(*, topk: int, normalized: bool) -> None:
    """Raise a UserError where a single expert would be renormalized.

    Its weight would be 1 and the router would get no gradient, so TransformerConfig refuses it.
    """
    require_field(
        topk > 1 or not normalized, "num_experts_per_tok", topk, "needs norm_topk_prob=false"
    )


def sigmoid_routing(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the router's arguments for DeepSeek-V3's routing (arXiv:2412.19437, section 2.1.2).

    Experts are chosen, within the best groups, by sigmoid score plus `e_score_correction_bias`, and
    weighed by their score, normalized and scaled. The bias is a buffer: RL leaves it as it is
    (`moe_router_bias_update_rate` is 0 unless overridden).
    """
    return {
        "moe_router_topk": config.num_experts_per_tok,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": config.routed_scaling_factor,
        **group_limit(config),
    }


def check_sigmoid_routing(config: PreTrainedConfig) -> None:
    """Raise a UserError naming what Megatron's sigmoid routing cannot express."""
    topk = config.num_experts_per_tok
    require_field(
        bool(config.norm_topk_prob) == (topk > 1),
        "norm_topk_prob",
        config.norm_topk_prob,
        f"with num_experts_per_tok={topk}: Megatron normalizes sigmoid scores of several experts, "
        "and of one never",
    )
    check_group_limit(config, experts_per_group_score=2)


def group_limit(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the router's arguments for choosing groups of experts first; none for one group."""
    if (config.n_group or 1) == 1:
        return {}
    return {
        "moe_router_num_groups": config.n_group,
        "moe_router_group_topk": config.topk_group,
    }


def check_group_limit(config: PreTrainedConfig, experts_per_group_score: int) -> None:
    """Raise a UserError where Megatron would score groups in another way than the model.

    Megatron's group_limited_topk adds a group's best num_experts_per_tok // topk_group experts;
    the model adds the best `experts_per_group_score`.
    """
    if (config.n_group or 1) == 1:
        return
    added = config.num_experts_per_tok // config.topk_group
    require_field(
        added == experts_per_group_score,
        "topk_group",
        config.topk_group,
        f"with num_experts_per_tok={config.num_experts_per_tok}: Megatron scores a group by its "
        f"best {added} experts, this model by its best {experts_per_group_score}",
    )
