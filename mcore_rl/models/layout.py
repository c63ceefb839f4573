"""Whether a parallel layout divides a model, and how a pipeline divides its layers.

Checked before any process builds a part of the model, so that the message names the key to change.
Rules that hold for every model (world size, sequence length) are not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from transformers import PreTrainedConfig

from mcore_rl.errors import require, user_error
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
    family = model_family(config)
    arch = family.transformer_kwargs(config)
    moe_layers = arch.get("moe_layer_freq", [0] * arch["num_layers"])

    tp = "tensor_model_parallel_size"

    def problem_of_tp(size: int) -> str:
        return _problem_of_tp(arch, size) or family.problem_of_tp(config, size)

    _require_fits(f"{key}.{tp}", layout.tp, problem_of_tp, arch)

    ep, etp = "expert_model_parallel_size", "expert_tensor_parallel_size"
    if any(moe_layers):
        require(  # moe_layer.py:380 refuses to train so
            layout.tp == 1 or sequence_parallel,
            f"{key}.sequence_parallel",
            sequence_parallel,
            f"cannot train experts with {tp}={layout.tp}",
            "Leave it out.",
        )
        for axis, size, field, count in (
            (ep, layout.ep, "num_experts", arch["num_moe_experts"]),
            (etp, layout.etp, "moe_intermediate_size", arch["moe_ffn_hidden_size"]),
        ):
            _require_fits(f"{key}.{axis}", size, partial(_problem_of_divisor, field, count), arch)
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


def check_engine_layout(config: PreTrainedConfig, num_ranks: int, key: str) -> None:
    """Raise a UserError naming `key` if an engine of so many ranks cannot divide the model.

    vLLM cuts heads, and units of MLPs and experts, over all its ranks; of key and value heads fewer
    than ranks each has copies.
    """
    arch = model_family(config).transformer_kwargs(config)
    _require_fits(key, num_ranks, partial(_problem_of_engine, arch), arch)


def _require_fits(
    key: str, size: int, problem_of: Callable[[int], str], arch: Mapping[str, Any]
) -> None:
    """Raise a UserError naming the nearest sizes that fit unless `problem_of(size)` is empty."""
    problem = problem_of(size)
    if not problem:
        return
    most = max(arch["num_attention_heads"], arch.get("num_moe_experts") or 1)
    fitting = [n for n in range(1, most + 1) if not problem_of(n)]
    below = [n for n in fitting if n < size][-1:]
    above = [n for n in fitting if n > size][:1]
    nearest = " or ".join(map(str, [*below, *above]))
    raise user_error(key, size, f"{problem} of the model", f"Nearest that does: {nearest}.")


def _problem_of_divisor(field: str, count: int, size: int) -> str:
    return "" if count % size == 0 else f"does not divide {field}={count}"


def _problem_of_tp(arch: Mapping[str, Any], size: int) -> str:
    """Return why tensor parallelism of that size does not divide the model; "" if it does."""
    heads, num_groups = arch["num_attention_heads"], arch["num_query_groups"]
    parts = [("num_attention_heads", heads)]
    if size > num_groups:  # Megatron then gives several ranks the same key and value head
        if size % num_groups and heads % size == 0:
            return f"is neither a divisor nor a multiple of num_key_value_heads={num_groups}"
        rows = (heads + 2 * num_groups) * arch["kv_channels"]
        parts.append(("rows in linear_qkv", rows))
    else:
        parts.append(("num_key_value_heads", num_groups))
    return _first_problem([*parts, *_mlp_parts(arch)], size)


def _problem_of_engine(arch: Mapping[str, Any], size: int) -> str:
    heads, num_groups = arch["num_attention_heads"], arch["num_query_groups"]
    if heads % size == 0 and num_groups % size and size % num_groups:
        return f"is neither a divisor nor a multiple of num_key_value_heads={num_groups}"
    parts = [("num_attention_heads", heads), *_mlp_parts(arch)]
    if arch.get("num_moe_experts"):
        parts.append(("moe_intermediate_size", arch["moe_ffn_hidden_size"]))
    return _first_problem(parts, size)


def _mlp_parts(arch: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return what every tensor-parallel rank has a part of beside attention, by name."""
    parts = []
    if not all(arch.get("moe_layer_freq", [0])):
        parts.append(("intermediate_size", arch["ffn_hidden_size"]))
    if shared_size := arch.get("moe_shared_expert_intermediate_size"):
        parts.append(("hidden units of the shared experts", shared_size))
    return parts


def _first_problem(parts: Iterable[tuple[str, int]], size: int) -> str:
    problems = (_problem_of_divisor(field, count, size) for field, count in parts)
    return next(filter(None, problems), "")
