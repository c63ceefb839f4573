"""Megatron and transformers: the same logits, log-probabilities and gradients from one checkpoint.

Sequences are packed into one row for Megatron and run one by one through transformers, in float32
on CPU, with eager attention. The checkpoints are those of `tiny_models`: every norm and bias
counts, and the mean probability of the likeliest token is about a quarter.
"""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from mcore_rl.algorithms.objectives import SftObjective
from mcore_rl.data.packing import SequenceCount
from mcore_rl.models.spec import load_hf_config
from tests import actor_cases
from tests.actor_inputs import (
    ONE_MICRO_BATCH,
    actor_spec,
    layout_id,
    random_sequences,
)
from tests.tiny_models import MODELS

SEQUENCES = random_sequences(7, (13, 2, 21, 5, 1, 8, 3))


@pytest.fixture(scope="module")
def transformers_model(tiny_checkpoint):
    """Return a function: checkpoint -> model, float32, eager."""

    @functools.cache
    def load(name):
        folder = tiny_checkpoint(name)
        return AutoModelForCausalLM.from_pretrained(
            folder,
            config=load_hf_config(folder),
            dtype=torch.float32,
            attn_implementation="eager",
        )

    return load


def transformers_logits(model, sequence):
    """Return [n - 1, V], the predictions of all tokens but the first."""
    return model(torch.tensor(sequence.token_ids[None])).logits[0, :-1]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(processes, tiny_checkpoint, transformers_model, name):
    """Proves the forward pass of every family, its packing and its loading, on one process.

    Does not cover bfloat16, long contexts (positions beyond 20) or rope scaling.
    """
    spec = actor_spec(tiny_checkpoint(name))
    (found,) = processes.run(actor_cases.logits, 1, spec, SEQUENCES)
    with torch.no_grad():
        expected = [transformers_logits(transformers_model(name), s) for s in SEQUENCES]
    found, expected = torch.cat(found), torch.cat(expected)
    assert expected.std() > 1
    # float32, logits of size up to 10; observed 1e-5 (the tied model of four layers), else 4e-6.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3_moe"])
def test_logprobs_by_token_are_those_of_transformers(
    processes, tiny_checkpoint, transformers_model, name
):
    """Proves the label shift, the mask, the temperature and the way back to sequences, and that
    the reference model keeps the initial weights while the policy is trained.
    """
    spec = actor_spec(tiny_checkpoint(name), temperature=0.7, with_reference=True)
    cut = SequenceCount(num_sequences=3)
    (found,) = processes.run(actor_cases.policy_and_reference_logprobs, 1, spec, SEQUENCES, cut)
    expected = []
    for sequence in SEQUENCES:
        with torch.no_grad():
            logprobs = (transformers_logits(transformers_model(name), sequence) / 0.7).log_softmax(
                -1
            )
        labels = torch.tensor(sequence.token_ids[1:], dtype=torch.int64).unsqueeze(-1)
        of_token = torch.cat([torch.zeros(1), logprobs.gather(-1, labels).squeeze(-1)])
        expected.append(torch.where(torch.tensor(sequence.loss_mask), of_token, 0.0))
    initial, reference, moved = (torch.cat([torch.tensor(x) for x in part]) for part in found)
    # float32 log-probabilities down to -20; observed 7e-6.
    torch.testing.assert_close(initial, torch.cat(expected), rtol=0, atol=1e-4)
    assert torch.equal(reference, initial)
    assert (moved - initial).abs().max() > 1e-2


GRADIENT_CASES = [
    (name, world_size, megatron)
    for name, model in MODELS.items()
    for world_size, megatron in ((1, {}), *model.layouts)
]


@pytest.mark.parametrize(("name", "world_size", "megatron"), GRADIENT_CASES, ids=layout_id)
def test_gradients_are_those_of_transformers(
    processes, tiny_checkpoint, transformers_model, name, world_size, megatron
):
    """Proves the backward pass for every tensor of every family, mapped through the export.

    The objective is the mean negative log-likelihood per trained token. Other layouts are compared
    with one process in test_distributed_invariance.
    """
    spec = actor_spec(tiny_checkpoint(name), **megatron)
    results = processes.run(
        actor_cases.gradients, world_size, spec, SEQUENCES, SftObjective(), ONE_MICRO_BATCH
    )
    found, metrics = next(result for result in results if result[1])  # one rank reports them
    model = transformers_model(name)
    model.zero_grad()
    losses = []
    for sequence in SEQUENCES:
        logprobs = transformers_logits(model, sequence).log_softmax(-1)
        labels = torch.tensor(sequence.token_ids[1:], dtype=torch.int64).unsqueeze(-1)
        trains = torch.tensor(sequence.loss_mask[1:], dtype=torch.bool)
        losses.append(-logprobs.gather(-1, labels).squeeze(-1)[trains])
    loss = torch.cat(losses).mean()
    loss.backward()
    # float32; observed 1.3e-7.
    assert metrics["sft/loss"] == pytest.approx(loss.item(), rel=1e-6)
    expected = checkpoint_gradients(model)
    biases = {n for n in found if n.endswith("e_score_correction_bias")}  # not trained
    assert found.keys() - biases == expected.keys()
    for tensor_name, gradient in expected.items():
        largest = gradient.abs().max()
        assert largest > 0, tensor_name
        # Relative to the tensor's largest gradient: float32 sums over 30 tokens and the layers
        # above; observed 3.6e-6, a key bias.
        difference = (found[tensor_name] - gradient).abs().max()
        assert difference <= 2e-5 * largest, (tensor_name, difference, largest)


def checkpoint_gradients(model):
    """Return the gradients under the names of checkpoint files.

    transformers keeps all experts of a layer in two tensors and writes one tensor per expert and
    projection; its own conversion turns the gradients as it turns the weights.
    """
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return revert_weight_conversion(model, gradients)
