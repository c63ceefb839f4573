"""The commands of the README, of the pages of docs/ and of the examples, as they stand there.

They run in a folder that has what they name: `/models/...` is found in it, and models of the hub in
a cache of the hub in it. Where a command would train on a cluster's batch, sizes are added.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from mcore_rl.config.checks import check_run
from mcore_rl.config.compose import compose_config, parse_command_line
from mcore_rl.config.run import RunConfig
from tests.e2e import commands
from tests.hub_cache import COMMIT, put_model
from tests.published_models import QWEN3_30B_A3B

pytestmark = pytest.mark.timeout(commands.TEST_LIMIT_S)

ROOT = Path(__file__).parents[2]
SMALLER = (
    "data.train_batch_size=8",
    "data.max_prompt_length=16",
    "data.max_response_length=8",
    "actor.ppo_mini_batch_size=8",
    "actor.megatron.dtype=float32",
    "rollout.kv_cache_memory_bytes=33554432",
    "trainer.total_training_steps=1",
)


PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def blocks() -> list[list[str]]:
    """Return the lines of each block that is for a shell, without comments and here-documents."""
    text = "\n".join(page.read_text() for page in PAGES)
    text = re.sub(r" <<'EOF'\n.*?^EOF$", "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [re.sub(r" *\\\n *", " ", block).splitlines() for block in found]
    return [[re.sub(r"(^|\s+)#.*", "", line) for line in block if line.strip()] for block in lines]


COMMANDS = dict.fromkeys(
    line for block in blocks() for line in block if line and not line.startswith(" ")
)
OVERRIDES = [
    [word for line in block if line.startswith(" ") for word in shlex.split(line)]
    for block in blocks()
]
OVERRIDES = [block for block in OVERRIDES if block]


def command(beginning: str) -> str:
    """Return the one command of the pages that begins so."""
    (found,) = (line for line in COMMANDS if line.startswith(beginning))
    return found


NEEDS_MACHINES = "needs several machines; in small: tests/e2e/test_e2e_machines.py"
NEEDS_RAY_CLUSTER = "needs a cluster of Ray; in small: tests/e2e/test_e2e_ray.py"
NEEDS_GPU = "needs a GPU; on CPU: tests/unit/tools/test_tools_gpu_check.py"
NEEDS_KUBERNETES = "needs a cluster of Kubernetes"
INSTALLS = "installs packages"
RECIPES = "tests/e2e/test_e2e_recipes.py"

RUN_ELSEWHERE = {
    "make test": "is what runs this test",
    "make lint": "is what a change must pass",
    "make install-cuda": "installs what needs a GPU; its locks: tests/unit/test_locks.py",
    "make docs": "tests/unit/docs/test_docs_site.py",
    "make quickstart": "tests/unit/examples/test_examples_quickstart.py",
    "mcore-rl doctor": "tests/e2e/test_e2e_doctor.py",
    "export MODEL=": RECIPES,  # and what follows it
    "examples/launch/": RECIPES,
    "examples/custom_loss/run.sh": "tests/unit/examples/test_examples_custom.py",
    "MCORE_RL_PLUGINS=": "tests/e2e/test_e2e_examples.py",
    "NODE_RANK=0 MASTER_ADDR=n1 examples/launch/": RECIPES,
    "LAUNCHER=ray examples/launch/": RECIPES,
    "MODEL=... TRAIN_DATA=... VAL_DATA=... examples/launch/": RECIPES,
    "LAUNCHER=ray MODEL=... TRAIN_DATA=... VAL_DATA=... examples/launch/": RECIPES,
    "mcore-rl replay ": "tests/e2e/test_e2e_replay.py",
    "mcore-rl eval ": "tests/e2e/test_e2e_train.py",
    "python benchmarks/algorithms.py": "54 trainings, hours",
    "torchrun ": NEEDS_MACHINES,
    "python -m mcore_rl.train --config-name gmpo trainer.launcher=ray": "tests/e2e/test_e2e_ray.py",
    "RAY_ADDRESS=": NEEDS_RAY_CLUSTER,
    "ray job submit ": NEEDS_RAY_CLUSTER,
    "kubectl ": NEEDS_KUBERNETES,
    "pip install ": INSTALLS,
    ".venv-cuda/bin/python tools/gpu_check.py": NEEDS_GPU,
    # Of mutations.md: cosmic-ray is no dependency.
    "python -m venv /tmp/mutants": INSTALLS,
    "git clone . /tmp/mutated": INSTALLS,
    "cat > cosmic-ray.toml": INSTALLS,
    "export PYTHONDONTWRITEBYTECODE=1": INSTALLS,
    "/tmp/mutants/bin/": INSTALLS,
}
"""Beginnings of commands -> the test that runs them, or what they need that a test has not."""

RUN_HERE = (
    "python -m mcore_rl.train --config-name gmpo model.path",
    "mcore-rl convert hf-to-mcore /models/",
    "mcore-rl convert hf-to-mcore outputs/",
    "mcore-rl convert mcore-to-hf ",
    "mcore-rl verify model ",
    "mcore-rl verify layouts ",
    "mcore-rl plan --config-name ",
    "mcore-rl plan --suggest ",
)


def test_every_command_is_run_by_a_test_or_needs_what_no_test_has():
    for line in COMMANDS:
        if line.startswith("pytest "):  # tests of this suite
            files = [word for word in line.split()[1:] if word.startswith("tests/")]
            assert files, line
            assert [name for name in files if not (ROOT / name).exists()] == []
        else:
            starts = [start for start in (*RUN_HERE, *RUN_ELSEWHERE) if line.startswith(start)]
            assert len(starts) == 1, (line, starts)
    for start in RUN_HERE:
        assert command(start)
    for start in RUN_ELSEWHERE:
        assert [line for line in COMMANDS if line.startswith(start)], start


def test_the_tests_that_run_commands_elsewhere_are_there():
    named = re.findall(r"tests/[\w/.]+\.py", " ".join(RUN_ELSEWHERE.values()))
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_no_command_hides_in_an_indented_block():
    for page in PAGES:
        assert re.findall(r"^ +```bash", page.read_text(), re.MULTILINE) == [], page.name


@pytest.mark.parametrize("block", OVERRIDES, ids=lambda block: block[0].split("=")[0])
def test_the_overrides_of_a_block_are_taken_together(block, monkeypatch):
    monkeypatch.setenv("KEY", "of the environment")
    named = ["model.path=m", "data.train_files=d", "data.val_files=v", "trainer.test_freq=20"]
    argv = ["--config-name", "gmpo", *named, "actor.megatron.transformer_impl=local", *block]
    line = parse_command_line("train", "", argv)
    assert line.warning == ""
    check_run(compose_config(RunConfig, line))


@dataclass(frozen=True)
class Place:
    """A folder with what the commands name."""

    folder: Path

    def run(self, line: str, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the command here, with these arguments at its end."""
        python = shlex.quote(sys.executable)
        line = re.sub(r"^python ", f"{python} ", line)
        line = re.sub(r"^mcore-rl ", f"{python} -m mcore_rl.cli ", line)
        line = line.replace("/models/", f"{self.folder}/models/")
        where = {"HF_HOME": f"{self.folder}/huggingface", "PYTHONPATH": f"{ROOT}"}
        return commands.finish(
            subprocess.Popen(
                ["bash", "-c", f"{line} {shlex.join(more)}"],
                cwd=self.folder,
                env=commands.ENVIRONMENT | where | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("readme")
    base, data = folder / "outputs" / "quickstart" / "base", folder / "data"
    for script, *argv in (
        ["make_model", "--out", base, "--initializer-range", "0.2"],
        ["make_data", "--out", data, "--train", "600", "--val", "8"],
    ):
        file = ROOT / "examples" / "quickstart" / f"{script}.py"
        subprocess.run([sys.executable, file, *argv], check=True, timeout=commands.LIMIT_S)
    (folder / "models").mkdir()
    for name in ("Qwen3-0.6B", "Qwen3-30B-A3B"):
        (folder / "models" / name).symlink_to(base)
    for name in ("train", "val"):
        (folder / f"{name}.parquet").symlink_to(data / f"{name}.parquet")
    rows = pq.read_table(data / "train.parquet").slice(0, 8).to_pylist()
    (data / "train.json").write_text(json.dumps(rows))
    (folder / "my_reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return sum(c.isdigit() for c in solution_str) / 8\n"
    )
    put_model(folder / "huggingface" / "hub", "Qwen/Qwen2.5-7B", base)
    large = folder / "large"
    QWEN3_30B_A3B.save_pretrained(large)
    put_model(folder / "huggingface" / "hub", "Qwen/Qwen3-30B-A3B-Base", large)
    return Place(folder)


def test_the_training_and_the_conversions_run(place):
    done = place.run(command("python -m mcore_rl.train --config-name gmpo model.path"), *SMALLER)
    assert done.returncode == 0, done.stderr
    run = place.folder / "outputs" / "mcore_rl" / "default"
    (first, last) = commands.read_metrics(run)
    assert first["reward/mean"] >= 0
    assert "eval/arithmetic/accuracy" in last
    (place.folder / "runs").mkdir()
    (place.folder / "runs" / "x").symlink_to(run)
    (run / "checkpoints" / "global_step_20").symlink_to(run / "checkpoints" / "global_step_1")
    for start, out in (
        ("hf-to-mcore /models/", "qwen3-mcore"),
        ("hf-to-mcore outputs/", "outputs/quickstart/mcore"),
        ("mcore-to-hf ", "my-model"),
    ):
        done = place.run(command(f"mcore-rl convert {start}"))
        assert done.returncode == 0, done.stderr
        assert (place.folder / out).is_dir()
    weights = {"model.safetensors", "config.json", "tokenizer.json"}
    assert weights <= set(os.listdir(place.folder / "my-model"))


def test_the_plan_of_a_model_that_is_named_as_on_the_hub_needs_no_weights(place):
    done = place.run(command("mcore-rl plan --config-name "))
    assert done.returncode == 0, done.stderr
    assert "placement   64 processes on 8 nodes" in done.stdout
    assert "  fits: " in done.stdout


def test_layouts_are_suggested_for_a_model_that_is_named_as_on_the_hub(place):
    done = place.run(command("mcore-rl plan --suggest "))
    assert done.returncode == 0, done.stderr
    assert "30,532,122,624 parameters on " in done.stdout
    assert "  impossible:" in done.stdout


def test_the_check_of_a_model_runs(place):
    done = place.run(command("mcore-rl verify model "))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("passed within 0.0001\n")


@pytest.mark.slow
def test_the_check_of_layouts_runs(place):
    done = place.run(command("mcore-rl verify layouts "))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 layouts agree with one process" in done.stdout


def test_train_sh_trains_a_model_that_is_named_as_on_the_hub(place):
    """As the documents have it; the variables make the batch small and reward digits."""
    readme = (ROOT / "examples" / "grpo" / "README.md").read_text()
    line = "examples/grpo/train.sh --model Qwen/Qwen2.5-7B --rollout_n 8 --epochs 20"
    assert f"\n{line}\n" in readme
    done = place.run(
        f"{ROOT}/{line}",
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        TRAIN_BATCH_SIZE="8",
        MAX_PROMPT_LENGTH="16",
        MAX_RESPONSE_LENGTH="8",
        REWARD_FUNC="my_reward.py",
        N_GPUS="1",
    )
    assert done.returncode == 0, done.stderr
    run = place.folder / "outputs" / "checkpoints"
    metrics = commands.read_metrics(run)
    assert len(metrics) == 20  # a step in each epoch
    assert all(line["actor/grad_norm"] > 0 for line in metrics)
    config = OmegaConf.load(run / "config.yaml")
    assert config.model.path == f"Qwen/Qwen2.5-7B@{COMMIT}"
    assert config.rollout.n == 8
