"""The critic: values and gradients of transformers, the same in every layout, saved and resumed."""

import functools
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from mcore_rl.algorithms.objectives import CriticObjective
from mcore_rl.data.packing import SequenceCount
from mcore_rl.megatron.config import OptimConfig
from mcore_rl.workers.spec import ModelSpec
from tests import critic_cases
from tests.actor_inputs import (
    CP2,
    EP2,
    ETP1,
    PP2,
    TP2,
    VPP2,
    actor_spec,
    layout_id,
    random_sequences,
)

# Updates proportional to the gradient, so that one of a wrong size shows.
OPTIM = OptimConfig(lr=1.0, eps=1.0, weight_decay=0.0)
OBJECTIVE = CriticObjective(
    cliprange_value=0.3, agg_mode="seq-mean-token-mean", loss_scale_factor=1.0
)
CUT = SequenceCount(num_sequences=3)


@pytest.fixture(scope="module")
def critic_checkpoint(tiny_checkpoint, tmp_path_factory):
    """Return a function: the folder of a tiny checkpoint with a value head."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("critics") / name
            shutil.copytree(tiny_checkpoint(name), folders[name])
            file = folders[name] / "model.safetensors"
            tensors = load_file(file)
            hidden_size = tensors["model.norm.weight"].shape[0]
            generator = torch.Generator().manual_seed(7)
            tensors["score.weight"] = torch.randn(1, hidden_size, generator=generator) / 6
            save_file(tensors, file, metadata={"format": "pt"})
        return folders[name]

    return folder_of


def critic_spec(actor, folder):
    return ModelSpec(
        model_path=str(folder),
        megatron=actor.megatron,
        optim=OPTIM,
        grad_clip=0.0,
        total_steps=10,
    )


@functools.cache
def on_one_process(processes, folder):
    """Return what `TRAINING` gives on one process."""
    return run(processes, folder, folder, TRAINING)


def run(processes, actor_folder, critic_folder, script, world_size=1, **megatron):
    """Return what rank 0 of a run got, after asserting that every rank got the same."""
    actor = actor_spec(actor_folder, **megatron)
    by_rank = processes.run(
        critic_cases.run_script,
        world_size,
        actor,
        critic_spec(actor, critic_folder),
        script,
        CUT,
    )
    assert all(answers == by_rank[0][0] for answers, _ in by_rank)
    return by_rank[0]


def sequences_to_learn(seed):
    """Return sequences with old values and returns; some values lie outside the clip range of
    what the critic gives."""
    generator = torch.Generator().manual_seed(100 + seed)
    return [
        replace(
            sequence,
            advantages=None,
            values=torch.randn(len(sequence.token_ids), generator=generator).tolist(),
            returns=torch.randn(len(sequence.token_ids), generator=generator).tolist(),
        )
        for sequence in random_sequences(seed)
    ]


TRAINING = [
    ("values", random_sequences(0)),
    ("begin_critic_step",),
    ("update_critic", sequences_to_learn(1), OBJECTIVE),
    ("begin_critic_step",),
    ("update_critic", sequences_to_learn(2), OBJECTIVE),
    ("values", random_sequences(3)),
]


def hf_values(folder, sequences, differentiable=False):
    """Return the values of each sequence by transformers, 0 where nothing trains, and the tensors
    that they come from."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).train(False)
    head = load_file(folder / "model.safetensors")["score.weight"].requires_grad_()
    found = []
    for sequence in sequences:
        hidden = model(torch.tensor(sequence.token_ids[None, :-1])).last_hidden_state[0]
        values = torch.cat([torch.zeros(1), (hidden @ head.t()).flatten()])
        found.append(torch.where(torch.tensor(sequence.loss_mask), values, 0.0))
    return found, [*model.parameters(), head]


@pytest.mark.parametrize("name", ["qwen3", "qwen2_tied", "qwen3_moe"])
def test_values_and_gradient_norm_are_those_of_transformers(processes, critic_checkpoint, name):
    folder = critic_checkpoint(name)
    sequences = [s for s in sequences_to_learn(0) if len(s.token_ids) > 2]
    expected, weights = hf_values(folder, sequences)
    script = [("values", sequences), ("begin_critic_step",)]
    script += [("update_critic", sequences, OBJECTIVE)]
    (values, _, metrics), _ = run(processes, folder, folder, script)
    for found, wanted in zip(values, expected, strict=True):
        # The contract for logits, float32 through two layers.
        assert torch.tensor(found) == pytest.approx(wanted.detach(), abs=1e-4)

    losses = []
    for value_T, sequence in zip(expected, sequences, strict=True):
        mask_T = torch.tensor(sequence.loss_mask)
        old_T, return_T = torch.tensor(sequence.values), torch.tensor(sequence.returns)
        clipped_T = old_T + (value_T - old_T).clamp(-0.3, 0.3)
        loss_T = 0.5 * torch.maximum((value_T - return_T) ** 2, (clipped_T - return_T) ** 2)
        if mask_T.any():
            losses.append(loss_T[mask_T].mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.stack([w.grad.norm() for w in weights if w.grad is not None]).norm()
    # float32 sums in another order; a norm adds up the errors of all tensors.
    assert metrics["critic/value_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["critic/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert 0.2 < metrics["critic/clip_frac"] < 0.8


@pytest.mark.parametrize(
    ("name", "world_size", "megatron"),
    [
        ("qwen3", 2, {}),
        ("qwen3", 2, TP2),
        ("qwen3", 2, TP2 | {"sequence_parallel": False}),
        ("qwen3", 2, CP2),
        ("qwen3", 2, VPP2),
        ("qwen2_tied", 2, PP2),
        ("qwen3_moe", 2, EP2),
        ("qwen3_moe", 2, TP2 | ETP1),
        ("qwen3_moe", 4, PP2 | TP2 | ETP1),
    ],
    ids=layout_id,
)
def test_two_updates_are_the_same_in_every_layout(
    processes, critic_checkpoint, name, world_size, megatron
):
    folder = critic_checkpoint(name)
    expected, expected_weights = on_one_process(processes, folder)
    found, weights = run(processes, folder, folder, TRAINING, world_size, **megatron)
    for step in (2, 4):
        for key in ("critic/value_loss", "critic/grad_norm"):
            assert found[step][key] == pytest.approx(expected[step][key], rel=1e-5)
    # Relative to the size of the values, as of the weights: the head's products cancel. Twice the
    # weights' 1e-5, which the values inherit through two layers and the head: 1.02e-5 was seen with
    # the kernels of one processor, less with others.
    scale = max(abs(value) for values in expected[-1] for value in values)
    for values, wanted in zip(found[-1], expected[-1], strict=True):
        assert values == pytest.approx(wanted, abs=2e-5 * scale)
    assert weights.keys() == expected_weights.keys()
    for key, weight in weights.items():
        scale = expected_weights[key].abs().max()
        assert (weight - expected_weights[key]).abs().max() <= 1e-5 * max(scale, 1.0), key
    head = load_file(folder / "model.safetensors")["score.weight"]
    assert (weights["score.weight"] - head).abs().max() > 0.01  # it did learn


def test_a_language_model_becomes_a_critic_whose_values_are_0_at_first(processes, tiny_checkpoint):
    folder = tiny_checkpoint("qwen3")
    (before, *_, after), weights = run(processes, folder, folder, TRAINING, 2, **TP2)
    assert all(value == 0.0 for values in before for value in values)
    assert any(abs(value) > 1e-3 for values in after for value in values)
    assert "score.weight" not in weights  # the checkpoint has none to compare with


@pytest.mark.parametrize("loaded_in", [(2, TP2 | ETP1), (1, {})], ids=str)
def test_a_critic_goes_on_from_its_checkpoint(processes, critic_checkpoint, tmp_path, loaded_in):
    """In the same layout bit by bit, in another up to rounding; its actor beside it."""
    folder = critic_checkpoint("qwen3_moe")
    first, last = TRAINING[:3], TRAINING[3:]
    save = [("begin_save", str(tmp_path)), ("end_save",)]
    begun, weights = run(processes, folder, folder, [*first, *save, *last], 2, **TP2, **ETP1)
    world_size, megatron = loaded_in
    script = [("load", str(tmp_path)), *last]
    resumed, resumed_weights = run(processes, folder, folder, script, world_size, **megatron)
    tolerance = 0.0 if world_size == 2 else 1e-5
    scale = max(abs(value) for values in begun[-1] for value in values)
    for expected, found in zip(begun[-1], resumed[-1], strict=True):
        assert found == pytest.approx(expected, rel=0.0, abs=tolerance * scale)
    for key, weight in weights.items():
        assert (weight - resumed_weights[key]).abs().max() <= tolerance * weight.abs().max(), key
    assert {path.name for path in tmp_path.iterdir()} == {"actor", "critic"}
