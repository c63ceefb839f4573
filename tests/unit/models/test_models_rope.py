"""The angle of every position and frequency: Megatron's as transformers'."""

import json
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mcore_rl.errors import UserError
from mcore_rl.models.rope import check_length, gpt_rope_kwargs, max_positions, yarn_numbers
from mcore_rl.models.spec import engine_overrides, load_hf_config
from tests.unit.models import rope_cases

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 2,
    "max_position_embeddings": 131072,
}
POSITIONS = 4096

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def rotary_config(**rope):
    return LlamaConfig(**SIZES, rope_parameters=rope)


def angles_and_factor_of_transformers(config):
    rotary = LlamaRotaryEmbedding(config)
    return torch.outer(torch.arange(POSITIONS).float(), rotary.inv_freq), rotary.attention_scaling


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        LLAMA3 | {"factor": 8.0},
        LLAMA3 | {"factor": 32.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_angles_are_those_of_transformers(rope):
    config = rotary_config(**rope)
    kwargs = gpt_rope_kwargs(config)
    assert kwargs.pop("position_embedding_type") == "rope"
    found = RotaryEmbedding(128, use_cpu_initialization=True, **kwargs)
    expected, factor = angles_and_factor_of_transformers(config)
    assert factor == 1
    # float32: the same powers on both sides, then for linear five roundings of 6e-8, namely the
    # reciprocal of the factor and two products here, a quotient and a product there. That is
    # 3.0e-7; observed 2.0e-7 (linear), else equal.
    torch.testing.assert_close(
        found.get_freqs_non_repeated(POSITIONS), expected, rtol=5e-7, atol=1e-6
    )


SCALES = [
    {},
    {"beta_fast": 16.0, "beta_slow": 2.0},
    {"mscale": 0.7, "mscale_all_dim": 1.0},
    {"mscale": 0.7},  # transformers takes it together with mscale_all_dim only
    {"truncate": False},
]


def test_angles_of_yarn_are_those_of_transformers(processes):
    configs = [
        rotary_config(
            rope_type="yarn",
            rope_theta=1e6,
            factor=4.0,
            original_max_position_embeddings=2048,
            **scales,
        )
        for scales in SCALES
    ]
    (found,) = processes.run(rope_cases.yarn_angles, 1, configs, 128, POSITIONS)
    for config, scales, (angles, factor) in zip(configs, SCALES, found, strict=True):
        expected, expected_factor = angles_and_factor_of_transformers(config)
        assert factor == pytest.approx(expected_factor, rel=1e-12), scales
        # As above; observed equal.
        torch.testing.assert_close(angles[:, :64], expected, rtol=5e-7, atol=1e-6)


def folder_with(tmp_path, **fields):
    config = rotary_config(rope_type="yarn", rope_theta=1e4, factor=4.0).to_dict()
    del config["rope_parameters"]["original_max_position_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    return tmp_path


def test_an_original_length_beside_the_scaling_is_what_transformers_builds_with(tmp_path):
    folder = folder_with(tmp_path, original_max_position_embeddings=32, max_position_embeddings=128)
    config = load_hf_config(folder)
    expected, _ = angles_and_factor_of_transformers(AutoConfig.from_pretrained(folder))
    found, _ = angles_and_factor_of_transformers(config)
    assert torch.equal(found, expected)
    assert yarn_numbers(config)["original_max_position_embeddings"] == 32
    assert engine_overrides(folder)["rope_parameters"]["original_max_position_embeddings"] == 32


def test_yarn_as_qwen_publishes_it_goes_beyond_the_old_length(tmp_path):
    """factor 4 is added and max_position_embeddings stays as it was."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    folder = folder_with(tmp_path, rope_parameters=rope | {"rope_theta": 1e6})
    config = load_hf_config(folder)
    config.max_position_embeddings = 32768
    assert max_positions(config) == 131072
    check_length(config, 131072, "--max-length")
    with pytest.raises(UserError, match=r"more than factor .*=131072"):
        check_length(config, 131073, "--max-length")


def test_without_a_scaling_the_positions_are_those_of_the_configuration():
    config = rotary_config(rope_type="linear", rope_theta=1e4, factor=3.0)
    with pytest.raises(UserError, match="=131073 is more than max_position_embeddings=131072"):
        check_length(config, 131073, "--max-length")
