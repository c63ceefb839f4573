"""Outputs of layers, recorded in a layout, are those of the layers of transformers."""

import pytest
import torch

from mcore_rl.data.packing import SequenceCount
from mcore_rl.verify.model_compare import TransformersModel
from tests import actor_cases
from tests.actor_inputs import CP2, EP2, ETP1, TP2, VPP2, actor_spec, layout_id, random_sequences

SEQUENCES = random_sequences(3, (9, 2, 14, 5, 11))
CASES = [
    ("qwen3_moe", 2, {}),
    ("qwen3_moe", 2, TP2 | EP2 | ETP1),
    ("qwen2_tied", 2, TP2 | {"sequence_parallel": False}),
    ("qwen2_tied", 2, VPP2),
    ("qwen2_tied", 2, CP2),
    ("qwen2_tied", 4, TP2 | CP2),
]


@pytest.mark.parametrize(("name", "world_size", "megatron"), CASES, ids=layout_id)
def test_outputs_of_layers_are_those_of_transformers(
    processes, tiny_checkpoint, name, world_size, megatron
):
    """Proves the names, and that rows which are packed, spread over ranks and cut into stages are
    put together in order: a position or a sequence in another's place would differ by 1."""
    spec = actor_spec(tiny_checkpoint(name), **megatron)
    cut = SequenceCount(num_sequences=2)
    for found in processes.run(actor_cases.layer_outputs, world_size, spec, SEQUENCES, cut):
        model = TransformersModel(tiny_checkpoint(name), "float32")
        for sequence, outputs in zip(SEQUENCES, found, strict=True):
            _, expected = model.score(sequence.token_ids)
            assert outputs.keys() == expected.keys() == set(model.names)
            for module, output in expected.items():
                difference = (torch.from_numpy(outputs[module]) - output).abs().max()
                # float32, relative to the largest output; observed 1.3e-6.
                assert difference <= 1e-5 * output.abs().max(), module
