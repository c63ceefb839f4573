"""Parts of a model in host memory: nothing is left on the device, nothing is lost on the way."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from mcore_rl.megatron.config import OptimConfig
from mcore_rl.types import Offloads, Part
from mcore_rl.workers.spec import ModelSpec
from tests.actor_inputs import (
    EP2,
    ETP1,
    LORA,
    PP2,
    TP2,
    VPP2,
    actor_spec,
    layout_id,
    policy_objective,
    random_sequences,
)
from tests.distributed import offload_cases
from tests.tiny_models import MOE

OPTIM = OptimConfig(lr=1e-3)
OBJECTIVE = policy_objective("geo_mean")
SEQUENCES = random_sequences(3)
OF_ALL_MODELS = frozenset({Part.PARAM, Part.GRAD, Part.OPTIMIZER})
EVERYTHING = Offloads(actor=OF_ALL_MODELS | {Part.REFERENCE}, critic=OF_ALL_MODELS)
NOT_SHARDED = {"use_distributed_optimizer": False}
BFLOAT16 = {"dtype": "bfloat16"}


def critic_of(actor):
    return ModelSpec(
        model_path=actor.model_path,
        megatron=actor.megatron,
        optim=OPTIM,
        grad_clip=1.0,
        total_steps=10,
    )


LAYOUTS = [
    ("qwen3", 1, {}),
    ("qwen3", 1, BFLOAT16),
    ("qwen3", 1, NOT_SHARDED),
    ("qwen3_moe", 2, BFLOAT16 | NOT_SHARDED | {"moe_router_freeze": True}),
    ("qwen3_moe", 2, BFLOAT16 | EP2 | {"overlap_grad_reduce": True}),
    ("qwen3_moe", 2, TP2 | ETP1),
    ("qwen2_tied", 2, PP2),
    ("qwen2_tied", 2, VPP2 | BFLOAT16),
]


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize(("name", "world_size", "megatron"), LAYOUTS, ids=layout_id)
def test_every_part_leaves_no_byte_behind_and_comes_back_bit_for_bit(
    processes, tiny_checkpoint, name, world_size, megatron, lora
):
    """Actor, its reference and critic; the storages are found without what is tested."""
    spec = actor_spec(
        tiny_checkpoint(name), optim=OPTIM, lora=lora, with_reference=not lora, **megatron
    )
    by_rank = processes.run(
        offload_cases.there_and_back, world_size, spec, critic_of(spec), SEQUENCES, OBJECTIVE
    )
    for found in by_rank:
        parts = {("actor", part) for part in OF_ALL_MODELS | (set() if lora else {Part.REFERENCE})}
        assert set(found) == parts | {("critic", part) for part in OF_ALL_MODELS}
        for key, (size, is_empty, same) in found.items():
            assert size > 0, key
            assert is_empty, key
            assert same, key
        adapters, whole = found["actor", Part.GRAD][0], found["critic", Part.GRAD][0]
        assert (adapters < whole / 2) == bool(lora)


@pytest.mark.parametrize(
    ("name", "world_size", "megatron", "lora"),
    [
        ("qwen2_tied", 1, BFLOAT16 | NOT_SHARDED, None),
        ("qwen3_moe", 2, EP2, None),
        ("qwen3", 2, TP2 | BFLOAT16, LORA),
        ("qwen2_tied", 2, PP2 | {"overlap_grad_reduce": True}, None),
    ],
    ids=layout_id,
)
def test_steps_with_everything_offloaded_give_the_same_bits(
    processes, tiny_checkpoint, tmp_path, name, world_size, megatron, lora
):
    """Actor, reference and critic for two steps, with a checkpoint read back between them: all
    numbers on the way, the weights exported and the state of the optimizer at the end."""
    spec = actor_spec(
        tiny_checkpoint(name), optim=OPTIM, lora=lora, with_reference=not lora, **megatron
    )
    reference = frozenset() if lora else {Part.REFERENCE}
    everything = replace(
        EVERYTHING,
        actor=OF_ALL_MODELS | reference,
        reference=Part.PARAM if lora else Part.REFERENCE,
    )
    runs = []
    for kind, offloads in (("here", Offloads()), ("away", everything)):
        folder = tmp_path / kind
        folder.mkdir()
        runs.append(
            processes.run(
                offload_cases.run,
                world_size,
                spec,
                critic_of(spec),
                offloads,
                SEQUENCES,
                OBJECTIVE,
                str(folder),
            )
        )
    for here, away in zip(*runs, strict=True):
        assert here[0] == away[0]
        for weights_here, weights_away in zip(here[1], away[1], strict=True):
            assert weights_here.keys() == weights_away.keys()
            for tensor in weights_here:
                assert torch.equal(weights_here[tensor], weights_away[tensor]), tensor
        assert here[2][0] == away[2][0]
        assert all(map(torch.equal, here[2][1], away[2][1]))
    here, away = (files_of(tmp_path / kind / "hf_model") for kind in ("here", "away"))
    assert here == away


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


def test_what_is_offloaded_leaves_the_resident_set(processes, tmp_path):
    """On CPU the copy takes the room that was freed, so the resident set stays as it is; once the
    copy is let go too, it is smaller by the parts."""
    wide = {"hidden_size": 256, "moe_intermediate_size": 256, "vocab_size": 4096}
    sizes: dict[str, Any] = MOE | wide
    config = Qwen3MoeConfig(**sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    sequences = random_sequences(0, vocab_size=4096)
    args = actor_spec(tmp_path, optim=OPTIM), sequences, OBJECTIVE
    [(size, here, away, gone)] = processes.run(offload_cases.resident_bytes, 1, *args)
    assert size > 50e6
    # A tenth for what else the process allocates and frees meanwhile.
    assert away - here == pytest.approx(0, abs=size / 10)
    assert here - gone == pytest.approx(size, rel=0.1)


def test_a_call_that_needs_what_is_away_is_an_error_that_names_it(
    processes, tiny_checkpoint, tmp_path
):
    spec = actor_spec(tiny_checkpoint("qwen3"), optim=OPTIM, with_reference=True)
    args = spec, critic_of(spec), SEQUENCES, OBJECTIVE, str(tmp_path)
    (told,) = processes.run(offload_cases.refusals, 1, *args)
    assert told == {
        "logprobs": "logprobs needs actor.param, which is in host memory",
        "record_logprobs": "record_logprobs needs actor.param, which is in host memory",
        "layer_outputs": "layer_outputs needs actor.param, which is in host memory",
        "ref_logprobs": "ref_logprobs needs actor.reference, which is in host memory",
        "export": "the export of weights needs actor.param, which is in host memory",
        "export_hf": "export_hf needs actor.param, which is in host memory",
        "values": "values needs critic.param, which is in host memory",
        "begin_save": "begin_save needs critic.param, which is in host memory",
        "load": "load needs actor.param, which is in host memory",
        "offload": "offload needs actor.grad, which is in host memory",
        "restore": "actor.param is on its device: there is nothing to restore",
        "update": "train_on needs actor.grad, which is in host memory",
        "numpy": told["numpy"],
    }
    assert told["numpy"].startswith("actor.param cannot be offloaded: ")
    assert told["numpy"].endswith(" bytes of it are also a numpy array")
