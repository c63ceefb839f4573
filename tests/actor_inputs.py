"""Specs, minibatches and objectives for tests that train an actor on a tiny checkpoint."""

from dataclasses import replace
from typing import Any

import torch

from mcore_rl.algorithms.objective import ObjectiveConfig, resolve_objective
from mcore_rl.algorithms.objectives import PolicyObjective
from mcore_rl.data.packing import SequenceCount
from mcore_rl.megatron.config import ALL_LINEAR, LoraConfig, MegatronConfig, OptimConfig
from mcore_rl.workers.spec import ActorSpec
from tests.carriers import make_sequence

ONE_MICRO_BATCH = SequenceCount(num_sequences=1000)

LENGTHS = (9, 3, 14, 5, 2, 11, 7, 6)
"""Tokens per sequence of a minibatch."""

# Settings of MegatronConfig that make layouts.
TP2: dict[str, Any] = {"tensor_model_parallel_size": 2}
PP2: dict[str, Any] = {"pipeline_model_parallel_size": 2}
CP2: dict[str, Any] = {"context_parallel_size": 2}
EP2: dict[str, Any] = {"expert_model_parallel_size": 2}
ETP1: dict[str, Any] = {"expert_tensor_parallel_size": 1}
ETP2: dict[str, Any] = {"expert_tensor_parallel_size": 2}
TP4: dict[str, Any] = {"tensor_model_parallel_size": 4}
PP4: dict[str, Any] = {"pipeline_model_parallel_size": 4}
CP4: dict[str, Any] = {"context_parallel_size": 4}
EP4: dict[str, Any] = {"expert_model_parallel_size": 4}
VPP2: dict[str, Any] = PP2 | {"virtual_pipeline_model_parallel_size": 2}

FULL_RECOMPUTE = {
    "override_transformer_config": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
}
SELECTIVE_RECOMPUTE = {
    "override_transformer_config": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "layernorm"],
    }
}

LORA = LoraConfig(rank=4, alpha=8, target_modules=(ALL_LINEAR,))
LORA_OF_EXPERTS = replace(LORA, target_modules=("gate_proj", "up_proj", "down_proj"))

_SHORT = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "virtual_pipeline_model_parallel_size": "vpp",
    "context_parallel_size": "cp",
    "expert_model_parallel_size": "ep",
    "expert_tensor_parallel_size": "etp",
    "sequence_parallel": "sp",
    "use_distributed_optimizer": "distopt",
    "overlap_grad_reduce": "overlap",
    "dtype": "",
    "moe_router_freeze": "freeze",
}


def layout_id(value):
    """Return a test id of arguments of `actor_spec`: "tp2-etp1"; None for other parameters."""
    if not isinstance(value, dict):
        return None
    parts = []
    for key, setting in value.items():
        if key == "override_transformer_config":
            granularity = setting.get("recompute_granularity")
            parts.append(f"recompute_{granularity}" if granularity else "_".join(setting))
        elif key == "lora":
            parts.append(key)
        else:
            parts.append(f"{_SHORT[key]}{setting if isinstance(setting, str) else int(setting)}")
    return "-".join(parts) or "dp"


def actor_spec(
    folder,
    *,
    dtype="float32",
    optim=None,
    grad_clip=1.0,
    temperature=1.0,
    with_reference=False,
    lora=None,
    **megatron,
):
    """Return the spec of an actor; further arguments are those of MegatronConfig."""
    return ActorSpec(
        model_path=str(folder),
        megatron=MegatronConfig(dtype=dtype, **megatron),
        optim=optim or OptimConfig(lr=1e-3),
        grad_clip=grad_clip,
        total_steps=10,
        temperature=temperature,
        with_reference=with_reference,
        lora=lora,
    )


def random_sequences(seed, lengths=LENGTHS, vocab_size=61):
    """Return sequences with random tokens, of which about a third do not train, and one advantage
    for each; the last trains nothing."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for number, length in enumerate(lengths):
        token_ids = torch.randint(vocab_size, (length,), generator=generator).tolist()
        trains = torch.rand(length, generator=generator) < 0.7
        trains[0] = False
        if number == len(lengths) - 1 > 0:
            trains[:] = False
        advantage = torch.randn(1, generator=generator)
        sequences.append(
            make_sequence(
                token_ids=token_ids,
                loss_mask=trains.tolist(),
                advantages=(advantage * trains).tolist(),
            )
        )
    return sequences


def with_other_logprobs(sequences, logprobs, seed):
    """Return the sequences with old, engine's and reference logprobs around the given ones."""
    generator = torch.Generator().manual_seed(seed)

    def near(sequence, values, spread):
        noise = torch.randn(len(values), generator=generator)
        return (torch.tensor(values) + spread * noise * torch.tensor(sequence.loss_mask)).tolist()

    return [
        replace(
            sequence,
            old_logprobs=near(sequence, values, 0.1),
            rollout_logprobs=near(sequence, values, 0.02),
            ref_logprobs=near(sequence, values, 0.3),
        )
        for sequence, values in zip(sequences, logprobs, strict=True)
    ]


def policy_objective(loss_mode, **options):
    """Return an objective as the loop makes it; options are those of the `actor` section."""
    config = ObjectiveConfig.of(loss_mode, **options)
    return PolicyObjective(spec=resolve_objective(config, 16), log_entropy=True)
