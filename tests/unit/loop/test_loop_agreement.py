"""Which differences in bfloat16 the check before step 0 lets through: healthy models', not others'.

The figures are those of transformers in bfloat16 against itself in float32, or with a fault.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from mcore_rl.loop.agreement import counts, disagreement, summary
from tests.tiny_models import save_tiny_checkpoint

SCALE = 0.3
"""Of the matrices, so that logits spread over a unit, as those of a trained model do of its own
tokens."""


@torch.no_grad()
def logprobs(model, tokens):
    logits = model(tokens).logits.float()[:, :-1]
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).flatten()


def without_a_norm(model):
    for name, parameter in model.named_parameters():
        if "layers.1.post_attention_layernorm" in name:
            parameter.fill_(1.0)


def with_slower_positions(model):
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq /= 4


def without_attention(model):
    model.get_parameter("model.layers.0.self_attn.o_proj.weight").zero_()


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "deepseek_v3"])
@torch.no_grad()
def test_bfloat16_tells_rounding_from_a_fault(name, tmp_path):
    model = save_tiny_checkpoint(name, tmp_path)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(SCALE)
    tokens = torch.randint(61, (8, 33), generator=torch.Generator().manual_seed(0))
    by_engine = logprobs(copy.deepcopy(model).bfloat16(), tokens)

    def found(other):
        return summary((logprobs(other, tokens) - by_engine).abs().tolist())

    # Observed: median 0.0018 to 0.0033, mean 0.0021 to 0.0046, largest 0.011 to 0.15.
    assert disagreement(found(model), "bfloat16", None) == ""
    # Observed: median 0.0188 and more; the largest, 0.083 to 1.1, would say nothing.
    for fault in (without_a_norm, with_slower_positions, without_attention):
        faulty = copy.deepcopy(model).bfloat16()
        fault(faulty)
        assert disagreement(found(faulty), "bfloat16", None) != "", fault.__name__


def test_one_flipped_expert_is_let_through_and_float32_is_strict():
    flipped = summary([0.003] * 99 + [0.9])
    assert disagreement(flipped, "bfloat16", None) == ""
    assert disagreement(flipped, "float32", None).startswith("the largest by 0.9, more than 0.001")
    assert disagreement(summary([9e-4] * 5), "float32", None) == ""


def test_every_token_by_half_a_unit_is_a_fault_though_none_is_far_off():
    assert disagreement(summary([0.54] * 100), "bfloat16", None).startswith("the median by 0.54")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_number_that_is_none_is_a_fault(dtype):
    assert disagreement(summary([0.0, math.nan, 0.0]), dtype, None) != ""


def test_tokens_are_counted_by_how_far_they_are_apart():
    differences = np.array([0.0, 5e-5, 2e-4, 0.02, 0.03, 3.0])
    assert counts(differences) == (
        "of 6 tokens 4 by more than 0.0001, 3 by more than 0.001, 3 by more than 0.01, "
        "1 by more than 0.1, 1 by more than 1"
    )
    assert counts(differences[:2]) == "of 2 tokens none by more than 0.0001"
