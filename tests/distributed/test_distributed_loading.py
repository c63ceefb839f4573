"""Every parameter of the model is held by some process, or nothing is loaded."""

import re

import pytest

from tests import actor_cases
from tests.actor_inputs import actor_spec

NAME = "decoder.layers.1.input_layernorm.weight"
MESSAGE = (
    r"actor\.megatron\.override_transformer_config=.* leaves 1 parameters of the model to no "
    rf"process, first \['{re.escape(NAME)}'\]"
)


@pytest.mark.parametrize("megatron", [{}, {"pipeline_model_parallel_size": 2}])
def test_a_parameter_that_no_process_holds_is_refused_on_every_rank(
    processes, tiny_checkpoint, megatron
):
    spec = actor_spec(tiny_checkpoint("qwen2"), **megatron)
    found = processes.run(actor_cases.load_without, 2, spec, NAME, (0, 1))
    assert all(re.match(MESSAGE, text) for text in found), found
    assert processes.run(actor_cases.load_without, 2, spec, NAME, ()) == [None, None]


def test_a_parameter_that_another_process_holds_is_not_missed(processes, tiny_checkpoint):
    spec = actor_spec(tiny_checkpoint("qwen2"))
    assert processes.run(actor_cases.load_without, 2, spec, NAME, (1,)) == [None, None]
