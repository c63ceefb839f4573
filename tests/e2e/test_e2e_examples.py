"""A loss, an estimator, a reward, a family, a transport and an engine of one's own, as the examples
have them, in one run of the real command that knows none of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.e2e import commands

pytestmark = pytest.mark.timeout(commands.TEST_LIMIT_S)

EXAMPLES = Path(__file__).parents[2] / "examples"
PLUGINS = {
    "custom_loss": "smooth_ratio",
    "custom_estimator": "group_median",
    "custom_reward": "digits_right",
    "custom_family": "mimo",
    "custom_transport": "safetensors_files",
    "custom_engine": "transformers_engine",
}
ENVIRONMENT = {
    "MCORE_RL_PLUGINS": ",".join(PLUGINS.values()),
    "PYTHONPATH": ":".join([str(EXAMPLES.parent), *(str(EXAMPLES / folder) for folder in PLUGINS)]),
}


def run_script(script: str, *argv: object) -> None:
    """Run a program of an example."""
    line = [sys.executable, str(EXAMPLES / script), *map(str, argv)]
    environment = commands.ENVIRONMENT | ENVIRONMENT
    subprocess.run(line, check=True, env=environment, timeout=commands.LIMIT_S)


@pytest.fixture(scope="module")
def out(files, tmp_path_factory) -> Path:
    """Return a folder with what the example of a family works on."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "base").symlink_to(files.model)
    (folder / "data").symlink_to(files.data)
    return folder


def test_a_run_trains_with_a_part_of_one_s_own_in_every_place(files, out):
    run_script("custom_family/make_model.py", files.model, out / "model")
    for name in ("train", "val"):
        source = files.data / f"{name}.parquet"
        run_script("custom_reward/make_rows.py", source, out / "rows" / f"{name}.parquet")
    done = commands.run(
        "--config-name",
        "grpo",
        f"model.path={out / 'model'}",
        f"data.train_files={out / 'rows' / 'train.parquet'}",
        f"data.val_files={out / 'rows' / 'val.parquet'}",
        f"trainer.default_local_dir={out / 'run'}",
        "actor.policy_loss.loss_mode=smooth_ratio",
        "actor.penalty_strength=2",
        "algorithm.adv_estimator=group_median",
        "algorithm.advantage_limit=0.25",
        "rollout.name=transformers",
        "rollout.weight_transport=safetensors_files",
        "rollout.n=4",
        "data.train_batch_size=8",
        "data.max_prompt_length=16",
        "data.max_response_length=4",
        "actor.ppo_mini_batch_size=4",
        "actor.megatron.dtype=float32",
        "trainer.total_training_steps=2",
        environment=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    first, second, validation = commands.read_metrics(out / "run")
    assert "of an engine are as the model's folder has them, bit by bit" in done.stderr
    for line in (first, second):
        # Of two updates the second finds moved weights.
        assert line["actor/ratio_penalty"] > 0
        assert 0 <= line["reward/is_number/mean"] <= 1
        assert line["advantage/max"] <= 0.25
        # float32, other kernels; observed 1e-6.
        assert line["mismatch/logprob_abs_diff/max"] < 1e-4
    assert "eval/digits_right/accuracy" in validation
    config = OmegaConf.load(out / "run" / "config.yaml")
    assert config.actor.penalty_strength == 2
    assert not list((out / "run").glob("weights_*"))
    assert (out / "run" / "hf_model" / "model.safetensors").is_file()


def test_a_family_of_one_s_own_is_converted_and_is_unknown_without_its_module(files, out):
    run_script("custom_family/make_model.py", files.model, out / "converted")
    argv = ("hf-to-mcore", str(out / "converted"), str(out / "mcore"), "--verify")
    unknown = commands.run(*argv, module="mcore_rl.convert")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: config.json: model_type='mimo' is none of the supp")
    done = commands.run(*argv, module="mcore_rl.convert", environment=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "verified: 27 tensors equal bit by bit" in done.stdout


@pytest.mark.slow
def test_the_script_of_the_family_checks_it_with_vllm_and_trains_it(out):
    done = subprocess.run(
        ["bash", str(EXAMPLES / "custom_family" / "run.sh"), "trainer.total_training_steps=1"],
        env=commands.ENVIRONMENT
        | ENVIRONMENT
        | {"OUT": str(out), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=2 * commands.LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vLLM: 25 parameters from two syncs are the folder's, bit by bit\n" in done.stdout
    assert "passed within 0.0001\n" in done.stdout
    assert len(commands.read_metrics(out / "mimo" / "run")) == 2
