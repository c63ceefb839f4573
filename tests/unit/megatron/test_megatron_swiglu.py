"""SwiGLU: the numbers of the plain formula, and its input alone kept for the backward pass."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from mcore_rl.megatron.swiglu import SwiGLU
from tests.actor_inputs import actor_spec
from tests.unit.megatron.block_spec_cases import activations

CONFIG = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)


def plain(gate_and_up):
    """Return what Megatron's unfused MLP computes (mlp.py:219)."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * (up + 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_bit_for_bit_those_of_the_plain_formula(dtype):
    generator = torch.Generator().manual_seed(0)
    values = (4 * torch.randn(5, 3, 16, generator=generator)).to(dtype)
    weights = torch.randn(5, 3, 8, generator=generator).to(dtype)
    found = []
    for function in (SwiGLU(CONFIG), plain):
        gate_and_up = values.clone().requires_grad_()
        output = function(gate_and_up)
        output.backward(weights)
        found.append((output, gate_and_up.grad))
    for ours, megatrons in zip(*found, strict=True):
        assert torch.equal(ours, megatrons)


def test_its_input_alone_waits_for_the_backward_pass():
    gate_and_up = torch.ones(2, 16, requires_grad=True)
    waiting = []
    with torch.autograd.graph.saved_tensors_hooks(waiting.append, lambda tensor: tensor):
        SwiGLU(CONFIG)(gate_and_up)
    assert [tensor.data_ptr() for tensor in waiting] == [gate_and_up.data_ptr()]


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_every_mlp_of_a_local_model_calls_it(processes, tiny_checkpoint, name):
    assert processes.run(activations, 1, actor_spec(tiny_checkpoint(name))) == [["SwiGLU"]]


def test_megatrons_fusion_takes_its_place(processes, tiny_checkpoint):
    fused: Any = {"override_transformer_config": {"bias_activation_fusion": True}}
    spec = actor_spec(tiny_checkpoint("qwen3"), **fused)
    assert processes.run(activations, 1, spec) == [["silu"]]
