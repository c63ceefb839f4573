"""Whole runs with LoRA on a dense model: adapters sent by themselves, and merged."""

from __future__ import annotations

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.e2e import commands

pytestmark = pytest.mark.timeout(commands.TEST_LIMIT_S)


@pytest.fixture(scope="module")
def run(files, prepared, tmp_path_factory):
    """Return a function: overrides -> (command, metrics) of a run of three steps in tensor
    parallelism."""
    root = tmp_path_factory.mktemp("dense")
    model = root / "model"
    config = Qwen3Config.from_pretrained(files.model)
    config.architectures = None
    Qwen3ForCausalLM(config).save_pretrained(model)
    for file in files.model.glob("*"):
        if not (model / file.name).exists():
            (model / file.name).write_bytes(file.read_bytes())

    def done(name, *overrides):
        argv = files.argv(
            root / name,
            f"model.path={model}",
            "model.lora_rank=4",
            "model.lora_alpha=8",
            "actor.megatron.expert_model_parallel_size=1",
            "actor.megatron.tensor_model_parallel_size=2",
            "trainer.total_training_steps=3",
            "trainer.val_before_train=false",
            "trainer.test_freq=-1",
            *overrides,
        )
        ended = prepared.run(*argv)
        assert ended.returncode == 0, ended.stderr
        return ended, commands.read_metrics(root / name)

    return done


@pytest.fixture(scope="module")
def merged(run):
    return run("merged", "rollout.lora_sync=merged")


@pytest.mark.parametrize("host", ["in_process", "process"])
def test_a_run_with_adapters_alone_agrees_as_one_with_merged_weights_does(run, merged, host):
    """The engines' log-probabilities are the trainer's within 1e-4 of float32 in both, after every
    sync. They are not equal: W x + s B (A x) rounds otherwise than (W + s B A) x does."""
    ended, metrics = run(host, f"rollout.host={host}")
    assert "syncs after the first bring the adapters alone" in ended.stderr
    assert "syncs bring merged weights: rollout.lora_sync=merged" in merged[0].stderr
    for line, other in zip(metrics[:3], merged[1][:3], strict=True):
        for found in (line, other):
            assert found["mismatch/logprob_abs_diff/max"] <= 1e-4
        assert line["actor/grad_norm"] > 0
        assert line["weight_sync/bytes"] < other["weight_sync/bytes"] / 2
