"""Whether a parallel layout divides a model, and how a pipeline divides its layers.

Checked before any process builds a part of the model, so that the message names the key to change.
Rules that hold for every model (world size, sequence length) are not here.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from mcore_rl.errors import require
from mcore_rl.models.spec import model_family
from mcore_rl.types import Layout


def check_layout(
    config: PreTrainedConfig,
    layout: Layout,
    key: str = "actor.megatron",
    *,
    sequence_parallel: bool = True,
) -> None:
    """Raise a UserError naming `key` and the model's field if `layout` does not divide the model.

    Args:
        config: of a supported family.
        layout: sizes of the parallel axes.
        key: config section that holds the sizes.
        sequence_parallel: whether it is on where tensor parallelism is.
    """
    arch = model_family(config).transformer_kwargs(config)
    moe_layers = arch.get("moe_layer_freq", [0] * arch["num_layers"])

    def require_divides(axis: str, size: int, field: str, count: int) -> None:
        require(
            count % size == 0,
            f"{key}.{axis}",
            size,
            f"does not divide {field}={count} of the model",
            f"Nearest that does: {_nearest_divisors(count, size)}.",
        )

    tp = "tensor_model_parallel_size"
    num_groups = arch["num_query_groups"]
    require_divides(tp, layout.tp, "num_attention_heads", arch["num_attention_heads"])
    if layout.tp > num_groups:  # Megatron then gives several ranks the same key and value head
        require(
            layout.tp % num_groups == 0,
            f"{key}.{tp}",
            layout.tp,
            f"is neither a divisor nor a multiple of num_key_value_heads={num_groups} of the model",
        )
        qkv_heads = arch["num_attention_heads"] + 2 * num_groups
        require_divides(tp, layout.tp, "rows in linear_qkv", qkv_heads * arch["kv_channels"])
    else:
        require_divides(tp, layout.tp, "num_key_value_heads", num_groups)
    if not all(moe_layers):
        require_divides(tp, layout.tp, "intermediate_size", arch["ffn_hidden_size"])

    ep, etp = "expert_model_parallel_size", "expert_tensor_parallel_size"
    if any(moe_layers):
        require(  # moe_layer.py:380 refuses to train so
            layout.tp == 1 or sequence_parallel,
            f"{key}.sequence_parallel",
            sequence_parallel,
            f"cannot train experts with {tp}={layout.tp}",
            "Leave it out.",
        )
        require_divides(ep, layout.ep, "num_experts", arch["num_moe_experts"])
        require_divides(etp, layout.etp, "moe_intermediate_size", arch["moe_ffn_hidden_size"])
        shared_size = arch.get("moe_shared_expert_intermediate_size", 0)
        require_divides(tp, layout.tp, "hidden units of the shared experts", shared_size)
    else:
        rule = "has no effect: the model has no experts"
        require(layout.ep == 1, f"{key}.{ep}", layout.ep, rule, "Use 1.")
        require(layout.etp in (1, layout.tp), f"{key}.{etp}", layout.etp, rule, "Use 1.")

    pp, vpp = "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
    num_layers = arch["num_layers"]
    require(
        layout.pp * layout.vpp <= num_layers,
        f"{key}.{pp}",
        layout.pp,
        f"times {vpp}={layout.vpp} is more than num_hidden_layers={num_layers} of the model",
        "A stage has at least one layer.",
    )


def layers_of_stages(num_layers: int, layout: Layout) -> list[int]:
    """Return how many layers each pipeline stage has, in the order in which a token passes them.

    As equal as they can be; the last ones, with the output layer, have fewer.
    """
    num_stages = layout.pp * layout.vpp
    fewer, num_larger = divmod(num_layers, num_stages)
    return [fewer + (stage < num_larger) for stage in range(num_stages)]


def _nearest_divisors(count: int, size: int) -> str:
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    below = max((n for n in divisors if n < size), default=1)
    above = min((n for n in divisors if n > size), default=below)
    return str(below) if above == below else f"{below} or {above}"
