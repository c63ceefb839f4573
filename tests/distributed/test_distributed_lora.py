"""Adapters train as the closed form says, the same in every layout, and leave the base alone."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from mcore_rl.algorithms.objectives import SftObjective
from mcore_rl.convert.convert import adapter_to_peft, mcore_to_hf
from mcore_rl.data.packing import SequenceCount
from mcore_rl.errors import UserError
from mcore_rl.megatron.config import OptimConfig
from tests.actor_inputs import (
    CP2,
    EP2,
    ETP1,
    FULL_RECOMPUTE,
    LORA,
    ONE_MICRO_BATCH,
    PP2,
    SELECTIVE_RECOMPUTE,
    TP2,
    TP4,
    VPP2,
    actor_spec,
    layout_id,
    policy_objective,
    random_sequences,
)
from tests.distributed import lora_cases

ETP2 = {"expert_tensor_parallel_size": 2}
OVERLAPPED_SHARED_EXPERTS = {"override_transformer_config": {"moe_shared_expert_overlap": True}}

# As in test_distributed_invariance: with epsilon 1 an update is proportional to the gradient, so a
# gradient of the wrong size shows.
OPTIM = OptimConfig(lr=0.5, eps=1.0, weight_decay=0.001)
OBJECTIVE = policy_objective("vanilla", entropy_coeff=0.05)
SEQUENCES = random_sequences(7, (13, 2, 21, 5, 1, 8, 3))
MINIBATCHES = [random_sequences(seed) for seed in range(3)]

LAYOUTS = [
    ("qwen3", 1, FULL_RECOMPUTE),
    ("qwen3", 2, {}),
    ("qwen3", 2, TP2 | {"sequence_parallel": False}),
    ("qwen3", 2, TP2),
    ("qwen3", 2, CP2),
    ("qwen3", 2, PP2 | {"overlap_grad_reduce": True}),
    ("qwen3_one_group", 2, TP2),
    ("qwen2_tied", 2, VPP2),
    ("qwen3_moe", 2, EP2),
    ("qwen3_moe", 2, TP2 | ETP1),
    ("qwen3_moe", 2, ETP2),
    ("qwen3_moe", 2, TP2 | EP2 | ETP1),
    ("qwen3_moe", 2, CP2 | EP2 | SELECTIVE_RECOMPUTE),
    ("qwen2_moe", 2, TP2 | {"use_distributed_optimizer": False}),
    ("qwen2_moe", 2, TP2 | ETP1 | OVERLAPPED_SHARED_EXPERTS),
    ("deepseek_v3", 2, TP2),
    ("qwen3_moe", 4, TP2 | EP2 | {"use_distributed_optimizer": False}),
    ("qwen3_moe", 4, TP4 | ETP2),
    ("qwen3_moe", 4, TP2 | EP2 | PP2 | ETP1),
]


@pytest.fixture(scope="module")
def one_process(processes, tiny_checkpoint):
    """Return a function: checkpoint -> what three steps on one process gave."""

    @functools.cache
    def train(name):
        spec = actor_spec(tiny_checkpoint(name), optim=OPTIM, lora=LORA)
        args = spec, MINIBATCHES, OBJECTIVE, ONE_MICRO_BATCH
        (found,) = processes.run(lora_cases.train, 1, *args)
        return found

    return train


@pytest.mark.parametrize(("name", "world_size", "megatron"), LAYOUTS, ids=layout_id)
def test_the_layout_changes_nothing(
    processes, tiny_checkpoint, one_process, name, world_size, megatron
):
    """Proves that adapters begin alike, and through three steps are trained alike (gradient norm
    and loss too), in every layout, and that the base stays as it is bit by bit.

    The first step moves B alone, since A's gradient is zero while B is.
    """
    expected_metrics, expected_before, expected_after, expected_logprobs, _ = one_process(name)
    spec = actor_spec(tiny_checkpoint(name), optim=OPTIM, lora=LORA, **megatron)
    args = spec, MINIBATCHES, OBJECTIVE, SequenceCount(num_sequences=3)
    worst = {"metric": 0.0, "weight": 0.0, "moved": 0.0, "logprob": 0.0}
    for found in processes.run(lora_cases.train, world_size, *args):
        metrics, before, after, logprobs, base_is_the_same = found
        assert base_is_the_same
        assert before.keys() == expected_before.keys()
        assert all(torch.equal(before[key], expected_before[key]) for key in before)
        for step, expected in zip(metrics, expected_metrics, strict=True):
            for key in ("actor/loss", "actor/grad_norm"):
                difference = abs(step[key] - expected[key]) / max(1.0, abs(expected[key]))
                worst["metric"] = max(worst["metric"], difference)
        for key, expected in expected_after.items():
            difference = (after[key] - expected).abs().max()
            moved = (expected - expected_before[key]).abs().max()
            assert moved > 0, key
            worst["weight"] = max(worst["weight"], float(difference / expected.abs().max()))
            worst["moved"] = max(worst["moved"], float(difference / moved))
        for values, expected in zip(logprobs, expected_logprobs, strict=True):
            difference = (torch.tensor(values) - torch.tensor(expected)).abs().max()
            worst["logprob"] = max(worst["logprob"], float(difference))
    limits = {"metric": 1e-5, "weight": 1e-5, "moved": 2e-4, "logprob": 1e-4}
    assert all(worst[kind] <= limits[kind] for kind in limits), worst


GRADIENT_CASES = [
    ("qwen3", 1, {}),
    ("mixtral", 1, {}),
    ("qwen2_moe", 2, TP2 | EP2 | ETP1),  # biases of queries, shared experts
    ("deepseek_v3", 2, TP2 | ETP2),  # latent attention
]


@pytest.mark.parametrize(("name", "world_size", "megatron"), GRADIENT_CASES, ids=layout_id)
def test_gradients_and_exports_are_those_of_transformers(
    processes, tiny_checkpoint, tmp_path, name, world_size, megatron
):
    """Proves, for adapters whose B is not zero, that

    - the exported model, in which they are merged, computes in transformers what they compute in
      Megatron, and PEFT's files hold what was merged;
    - gradients are those of the merged weights W, projected: dB = s dW A^T, dA = s B^T dW, where
      the A that fused layers share gets the sum;
    - the reference, adapters disabled, is the base; export and training leave the base as it is.
    """
    folder = tmp_path / "exported"
    spec = actor_spec(tiny_checkpoint(name), lora=LORA, **megatron)
    args = spec, SEQUENCES, SftObjective(), ONE_MICRO_BATCH, str(folder)
    results = processes.run(lora_cases.gradients_and_export, world_size, *args)
    metrics, found = next(result for result in results if result[0])  # one rank reports metrics
    base, merged = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        for path in (tiny_checkpoint(name), folder)
    )
    assert found["base_is_the_same"]
    for model, logprobs in ((merged, found["logprobs"]), (base, found["ref_logprobs"])):
        with torch.no_grad():
            expected = torch.cat([token_logprobs(model, sequence) for sequence in SEQUENCES])
        # float32 log-probabilities down to -20; observed 8e-6.
        values = torch.cat([torch.tensor(values) for values in logprobs])
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-4)

    assert found["initial_logprobs"] == found["ref_logprobs"]  # B begins as zeros
    num_tokens = sum(sequence.num_trained_tokens for sequence in SEQUENCES)
    of_tokens = torch.cat([token_logprobs(merged, sequence) for sequence in SEQUENCES])
    loss = -of_tokens.sum() / num_tokens
    loss.backward()
    assert metrics["sft/loss"] == pytest.approx(loss.item(), rel=1e-5)
    weights = revert_weight_conversion(base, dict(base.named_parameters()))
    merged_weights = revert_weight_conversion(merged, dict(merged.named_parameters()))
    gradients: Any = {key: param.grad for key, param in merged.named_parameters()}
    of_weights = revert_weight_conversion(merged, gradients)
    peft = load_file(folder / "adapter" / "adapter_model.safetensors")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    assert scale == LORA.scale
    expected_gradients = {}
    layers = {key.partition(".lora_")[0] for key in peft}
    assert {layer.rpartition(".")[2] for layer in layers} == set(config["target_modules"])
    for layer in layers:
        hf = layer.removeprefix("base_model.model.")
        a, b = peft[f"{layer}.lora_A.weight"], peft[f"{layer}.lora_B.weight"]
        change = merged_weights[f"{hf}.weight"] - weights[f"{hf}.weight"]
        # float32; both were rounded to the size of the weight, up to 1.
        torch.testing.assert_close(change, scale * b @ a, rtol=0, atol=1e-6)
        d_weight = of_weights[f"{hf}.weight"]
        expected_gradients[f"{hf}.lora_B.weight"] = scale * d_weight @ a.T
        shared = next(key for key in found["adapters"] if torch.equal(found["adapters"][key], a))
        so_far = expected_gradients.get(shared, 0.0)
        expected_gradients[shared] = so_far + scale * b.T @ d_weight
    assert found["gradients"].keys() == expected_gradients.keys()
    worst = 0.0
    for key, expected in expected_gradients.items():
        largest = expected.abs().max()
        assert largest > 0, key
        worst = max(worst, float((found["gradients"][key] - expected).abs().max() / largest))
    # Relative to the tensor's largest: sums over 30 tokens and the layers above; observed 1.7e-5
    # (latent attention), else 3.8e-6.
    assert worst <= 5e-5


@pytest.mark.parametrize(
    ("name", "world_size", "megatron"),
    [("qwen3", 2, TP2), ("qwen2_tied", 2, PP2), ("qwen3_moe", 4, TP2 | EP2 | PP2 | ETP1)],
    ids=layout_id,
)
def test_a_sync_brings_the_base_and_the_adapters_as_pefts_folder_has_them(
    processes, tiny_checkpoint, tmp_path, name, world_size, megatron
):
    """To every rank, in small buckets; of fused layers those that are not named are left out."""
    lora = replace(LORA, target_modules=("q_proj", "up_proj", "down_proj"))
    base = tiny_checkpoint(name)
    folder = tmp_path / "exported"
    spec = actor_spec(base, lora=lora, **megatron)
    peft = None
    for weights, adapters in processes.run(
        lora_cases.sent_separately, world_size, spec, 4096, str(folder)
    ):
        expected = load_file(Path(base) / "model.safetensors")
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], expected[key]) for key in weights)
        peft = peft or load_file(folder / "adapter" / "adapter_model.safetensors")
        assert adapters.keys() == peft.keys()
        assert all(torch.equal(adapters[key], peft[key]) for key in peft)
        assert all(peft[key].abs().max() > 0 for key in peft)


def test_a_checkpoint_of_other_adapters_or_of_another_base_is_refused(
    processes, tiny_checkpoint, tmp_path
):
    """The base of the last but one differs from the checkpoint's in one number of one expert."""
    folder, base, changed = tmp_path / "saved", tiny_checkpoint("qwen3_moe"), tmp_path / "changed"
    folder.mkdir()
    shutil.copytree(base, changed)
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.1.mlp.experts.3.down_proj.weight"][5, 7] += 1e-6
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    others = [
        actor_spec(base, lora=replace(LORA, rank=8)),
        actor_spec(base, lora=replace(LORA, alpha=4)),
        actor_spec(base, lora=replace(LORA, target_modules=("o_proj",))),
        actor_spec(base),
        actor_spec(changed, lora=LORA),
        actor_spec(base, lora=LORA),
    ]
    args = actor_spec(base, lora=LORA), others, str(folder)
    (answers,) = processes.run(lora_cases.save_and_load, 1, *args)
    rule = f"is not what the checkpoint {folder}/actor was saved with"
    for answer, start in zip(
        answers[:5],
        (
            f"model.lora_rank=8 {rule}, 4.",
            f"model.lora_alpha=4 {rule}, 8.",
            f"model.target_modules=['o_proj'] {rule}, ['all-linear'].",
            f"model.lora_rank=0 {rule}, 4.",
            "weights of model.path='",
        ),
        strict=True,
    ):
        assert answer.startswith(start)
        assert rule in answer
    assert answers[5] is None
    with pytest.raises(UserError, match="has not the weights that the adapters were trained on"):
        mcore_to_hf(folder, tmp_path / "out", config_from=changed)


@pytest.mark.parametrize(
    ("name", "world_size", "megatron", "modules"),
    [
        ("qwen3_moe", 2, TP2 | EP2 | ETP1, ("all-linear",)),
        ("qwen2_tied", 2, TP2, ("q_proj", "v_proj")),
        ("qwen3", 1, {}, ("v_proj", "up_proj", "o_proj")),
    ],
    ids=["all", "q_and_v", "v_and_up"],
)
def test_a_checkpoint_in_the_middle_is_converted_to_what_the_run_exports(
    processes, tiny_checkpoint, tmp_path, name, world_size, megatron, modules
):
    """Merged and as an adapter, bit by bit; of fused layers those that are not named stay, though
    the other rows of the shared B are not 0."""
    base, folder, out = tiny_checkpoint(name), tmp_path / "saved", tmp_path / "exported"
    folder.mkdir()
    lora = replace(LORA, target_modules=modules)
    spec = actor_spec(base, optim=OPTIM, lora=lora, **megatron)
    args = spec, MINIBATCHES[0], OBJECTIVE, ONE_MICRO_BATCH, str(folder), str(out)
    for _, base_is_the_same in processes.run(lora_cases.save_and_export, world_size, *args):
        assert base_is_the_same

    mcore_to_hf(folder, tmp_path / "merged", config_from=base)
    exported, merged, before = (
        load_file(path / "model.safetensors") for path in (out, tmp_path / "merged", Path(base))
    )
    assert merged.keys() == exported.keys()
    assert all(torch.equal(merged[key], exported[key]) for key in exported)
    kept = [key for key in merged if torch.equal(merged[key], before[key])]
    adapted = {key.split(".")[-2] for key in merged.keys() - kept}
    if modules != ("all-linear",):
        assert adapted == set(modules)

    adapter_to_peft(folder, tmp_path / "peft", config_from=base)
    expected = load_file(out / "adapter" / "adapter_model.safetensors")
    found = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert set(written["target_modules"]) == adapted
    assert len(kept) + len(found) // 2 == len(merged)


def test_the_digest_of_the_base_does_not_depend_on_the_layout(processes, tiny_checkpoint):
    """One process against shards with padding, experts of two ranks, and a tied copy."""
    for name, world_size, megatron in (
        ("qwen3_moe", 2, TP2),
        ("qwen3_moe", 2, EP2),
        ("qwen2_tied", 2, PP2),
        ("deepseek_v3", 4, TP2 | PP2),
    ):
        folder = tiny_checkpoint(name)
        alone, spread = actor_spec(folder, lora=LORA), actor_spec(folder, lora=LORA, **megatron)
        (one,) = processes.run(lora_cases.identity, 1, alone)
        others = processes.run(lora_cases.identity, world_size, spread)
        assert others == [one] * world_size


def token_logprobs(model, sequence):
    """Return [n]: log-probabilities of the tokens that train, zeros at the others."""
    tokens = torch.tensor(sequence.token_ids).long()
    logprobs_LV = model(tokens.unsqueeze(0)).logits[0, :-1].log_softmax(-1)
    logprobs = logprobs_LV.gather(-1, tokens[1:].unsqueeze(-1)).squeeze(-1)
    logprobs = torch.cat([torch.zeros(1), logprobs])
    return torch.where(torch.tensor(sequence.loss_mask), logprobs, 0.0)
