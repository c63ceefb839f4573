"""How adapters get to the engines is decided before a run, with a reason."""

import pytest

from mcore_rl.config.compose import compose_config, parse_command_line
from mcore_rl.config.run import RunConfig
from mcore_rl.errors import UserError
from mcore_rl.rollout.base import EngineAdapters, RolloutConfig
from mcore_rl.run.adapters import SHOWN_LAYERS, adapters_of_engines, why_merged


@pytest.mark.parametrize(
    ("has_experts", "rank", "layers", "rollout", "reason"),
    [
        (False, 8, SHOWN_LAYERS, {}, None),
        (False, 512, ["q_proj"], {"sleep_level": 1}, None),
        (True, 8, ["q_proj"], {}, "experts"),
        (False, 8, ["q_proj", "kv_b_proj"], {}, "adapters of kv_b_proj"),
        (False, 513, ["q_proj"], {}, "lora_rank=513"),
        (False, 8, ["q_proj"], {"sleep_level": 2}, "sleep_level=2"),
        (False, 8, ["q_proj"], {"name": "fake"}, "engine fake"),
    ],
)
def test_what_keeps_adapters_merged_is_said(has_experts, rank, layers, rollout, reason):
    found = why_merged(has_experts, rank, sorted(layers), RolloutConfig(**rollout))
    assert found is None if reason is None else reason in str(found)


@pytest.fixture
def decide(tiny_checkpoint):
    """Return a function: model, overrides -> what engines take beside the weights."""

    def decided(name, *overrides):
        argv = [f"model.path={tiny_checkpoint(name)}", "data.train_files=d", *overrides]
        line = parse_command_line("train", "", argv)
        return adapters_of_engines(compose_config(RunConfig, line))

    return decided


LORA = ("model.lora_rank=8", "model.lora_alpha=32")


def test_a_dense_model_has_its_adapters_beside_the_weights_unless_told(decide):
    assert decide("qwen3", *LORA) == EngineAdapters(rank=8, alpha=32, layers=sorted(SHOWN_LAYERS))
    some = decide(
        "qwen3", *LORA, "model.target_modules=[v_proj,q_proj]", "rollout.lora_sync=adapter"
    )
    assert some == EngineAdapters(rank=8, alpha=32, layers=["q_proj", "v_proj"])
    assert decide("qwen3", *LORA, "rollout.lora_sync=merged") is None
    assert decide("qwen3") is None


def test_a_mixture_of_experts_has_them_merged_and_says_so_when_told_otherwise(decide):
    assert decide("qwen3_moe", *LORA) is None
    with pytest.raises(UserError, match=r"^rollout.lora_sync='adapter' cannot be: .*experts"):
        decide("qwen3_moe", *LORA, "rollout.lora_sync=adapter")
