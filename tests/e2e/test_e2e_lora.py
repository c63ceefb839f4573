"""A whole run with LoRA on a mixture of experts: adapters train, the engine gets them merged, the
base stays."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e import commands

pytestmark = pytest.mark.timeout(commands.TEST_LIMIT_S)


def test_adapters_train_and_the_engine_gets_them_merged(files, prepared, tmp_path):
    """Two processes with expert parallelism, the KL term against the base, three steps."""
    run_dir = tmp_path / "run"
    argv = files.argv(
        run_dir,
        "trainer.total_training_steps=3",
        "actor_rollout_ref.model.lora_rank=4",
        "actor_rollout_ref.model.lora_alpha=8",
        "actor.use_kl_loss=true",
        "trainer.test_freq=-1",
        "trainer.val_before_train=false",
    )
    done = prepared.run(*argv)
    assert done.returncode == 0, done.stderr
    assert "LoRA: 20 modules of 20" in done.stderr
    metrics = commands.read_metrics(run_dir)
    for line in metrics[:3]:
        # float32 on both sides; observed 6e-6.
        assert line["mismatch/logprob_abs_diff/max"] <= 1e-3
        assert line["actor/grad_norm"] > 0
    # The reference is the base: no distance in the first update, of two in a step, then some.
    kl = [line["actor/kl_loss"] for line in metrics[:3]]
    assert kl[0] < 0.01 < kl[2]

    base, merged = (
        load_file(folder / "model.safetensors") for folder in (files.model, run_dir / "hf_model")
    )
    peft = load_file(run_dir / "hf_model" / "adapter" / "adapter_model.safetensors")
    adapted = set()
    for name in peft:
        layer, _, half = name.partition(".lora_")
        if half == "B.weight":
            weight = layer.removeprefix("base_model.model.") + ".weight"
            change = 8 / 4 * peft[name] @ peft[f"{layer}.lora_A.weight"]
            assert change.abs().max() > 0
            # float32 weights of size 1.
            torch.testing.assert_close(merged[weight], base[weight] + change, rtol=0, atol=1e-6)
            adapted.add(weight)
    assert len(adapted) == 2 * (4 + 4 * 3)
    assert all(torch.equal(merged[name], base[name]) for name in base.keys() - adapted)
