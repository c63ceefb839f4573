"""Bad input to the real command: exit code 2, one line that names the culprit, nothing touched.

All cases run in one process that has imported the command once and forks for each; a case ends
before any worker starts.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import commands
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from mcore_rl.config.compose import compose_config, parse_command_line, to_yaml
from mcore_rl.config.run import RunConfig
from mcore_rl.models.mappings import hf_shapes
from mcore_rl.models.spec import load_hf_config, model_family

ROW = {"data_source": "arithmetic", "prompt": "1+1=", "ground_truth": "2"}
NO_CUSTOM_REWARD = "custom_reward_function.path=null"


@dataclass(frozen=True)
class Case:
    """One way to get it wrong."""

    expected: str
    """Regular expression of the whole line after "error: "; {dir} is the folder of the inputs."""
    overrides: tuple[str, ...] = ()
    prepare: Callable[[Path], object] = field(default=lambda folder: None)
    """Makes the bad input in an empty folder."""
    is_used_with: tuple[str, ...] | None = None
    """Overrides of the run that used the run folder before; None: nobody did."""
    world_size: int = 1


def json_rows(*rows) -> Callable[[Path], object]:
    return lambda folder: (folder / "bad.json").write_text(json.dumps(rows))


def parquet_rows(*rows) -> Callable[[Path], object]:
    return lambda folder: pq.write_table(pa.Table.from_pylist(list(rows)), folder / "bad.parquet")


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def weights(cut_short: bool = False, **shapes: tuple[int, ...]) -> Callable[[Path], object]:
    """Return a function that writes a model; `shapes` are of tensors that it should not have so."""
    sizes = {
        "model_type": "qwen2",
        "vocab_size": 7,
        "hidden_size": 4,
        "intermediate_size": 2,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }

    def write(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(sizes))
        config = load_hf_config(folder)
        entries = model_family(config).entries(config)
        right = {name: shape for entry in entries for name, shape in hf_shapes(entry).items()}
        tensors = {name: torch.zeros(shape) for name, shape in (right | shapes).items()}
        file = folder / "model.safetensors"
        save_file(tensors, file)
        if cut_short:
            file.write_bytes(file.read_bytes()[:-1])

    return write


BAD_JSON = "data.train_files={dir}/bad.json"
CASES = {
    "model folder is missing": Case(
        r"model\.path='{dir}/none' is not a folder\. .*", ("model.path={dir}/none",)
    ),
    "model folder is empty": Case(
        r"model\.path='{dir}' has no config\.json\.", ("model.path={dir}",)
    ),
    "model is of an unknown family": Case(
        r".*model_type='gpt9': there is no such model family\..*Registered: .*qwen3_moe.*",
        ("model.path={dir}",),
        text("config.json", '{"model_type": "gpt9"}'),
    ),
    "weights are cut short": Case(
        r"{dir}/model\.safetensors is damaged or cut short: .*",
        ("model.path={dir}",),
        weights(cut_short=True),
    ),
    "weights are of another size than the configuration": Case(
        r"checkpoint {dir}: shape of model\.norm\.weight=\(5,\) is not \(4,\), .*",
        ("model.path={dir}",),
        weights(**{"model.norm.weight": (5,)}),
    ),
    "weights are of a model with more layers": Case(
        r"checkpoint='{dir}' has 1 tensors that config\.json has no place for, first .*",
        ("model.path={dir}",),
        weights(**{"model.layers.1.mlp.down_proj.weight": (4, 2)}),
    ),
    "data file is missing": Case(
        r"{dir}/none\.parquet: there is no such file\. .*",
        ("data.train_files={dir}/none.parquet",),
    ),
    "second data file is missing": Case(
        r"{dir}/none\.json: there is no such file\. .*",
        ("data.train_files=[{dir}/bad.json,{dir}/none.json]",),
        json_rows(ROW),
    ),
    "validation file is missing": Case(
        r"{dir}/none\.parquet: there is no such file\. .*", ("data.val_files={dir}/none.parquet",)
    ),
    "data file is empty": Case(
        r"{dir}/bad\.json: holds no rows\. .*", (BAD_JSON,), text("bad.json", "")
    ),
    "table without rows": Case(
        r"{dir}/bad\.parquet: holds no rows\. .*",
        ("data.train_files={dir}/bad.parquet",),
        lambda folder: pq.write_table(
            pa.Table.from_pylist([ROW]).slice(0, 0), folder / "bad.parquet"
        ),
    ),
    "data file is neither table nor JSON": Case(
        r"{dir}/bad\.json: is neither Parquet nor .*", (BAD_JSON,), text("bad.json", "prompt,x\n")
    ),
    "damaged JSON line": Case(
        r"{dir}/bad\.json line 2: is not valid JSON .*",
        (BAD_JSON,),
        text("bad.json", json.dumps(ROW) + '\n{"prompt": \n'),
    ),
    "row without prompt": Case(
        r"{dir}/bad\.json row 1, column 'prompt': .*",
        (BAD_JSON,),
        json_rows(ROW, {k: v for k, v in ROW.items() if k != "prompt"}),
    ),
    "row with a prompt of the wrong type": Case(
        r"{dir}/bad\.parquet row 0, column 'prompt': .*",
        ("data.train_files={dir}/bad.parquet",),
        parquet_rows(ROW | {"prompt": 3}),
    ),
    "row without ground truth": Case(
        r"{dir}/bad\.json row 0, column 'ground_truth': .*",
        (BAD_JSON,),
        json_rows({k: v for k, v in ROW.items() if k != "ground_truth"}),
    ),
    "prompt is too long": Case(
        r"{dir}/bad\.json row 1, column 'prompt': \d+ tokens, more than "
        r"data\.max_prompt_length=16\. .*data\.truncation=left.*",
        (BAD_JSON,),
        json_rows(ROW, ROW | {"prompt": "1+" * 20}),
    ),
    "every prompt is too long": Case(
        r"data\.max_prompt_length=2 is less than every one of the 32 prompts.*",
        ("data.max_prompt_length=2", "data.filter_overlong_prompts=true"),
    ),
    "fewer rows than a batch": Case(
        r"data\.train_batch_size=8 is more than the 1 rows of data\.train_files\. .*",
        (BAD_JSON,),
        json_rows(ROW),
    ),
    "data source without a reward": Case(
        r"data_source='riddles': there is no such reward\..*custom_reward_function\.path.*",
        (BAD_JSON, NO_CUSTOM_REWARD),
        json_rows(*[ROW | {"data_source": "riddles"}] * 8),
    ),
    "reward file is missing": Case(
        r"custom_reward_function\.path='{dir}/none\.py' does not exist\. .*",
        ("custom_reward_function.path={dir}/none.py",),
    ),
    "reward file without the function": Case(
        r"custom_reward_function\.name='compute_score' is not defined in {dir}/bad\.py\. "
        r"Did you mean 'compute_scores'\? Functions: compute_scores\.",
        ("custom_reward_function.path={dir}/bad.py",),
        text("bad.py", "def compute_scores(data_source, **_):\n    return 0\n"),
    ),
    "reward file that does not import": Case(
        r"custom_reward_function\.path='{dir}/bad\.py' fails to import .*ZeroDivisionError.*",
        ("custom_reward_function.path={dir}/bad.py",),
        text("bad.py", "1 / 0\n"),
    ),
    "misspelt key": Case(
        r"actor\.optim\.learning_rat: there is no such key\..*", ("actor.optim.learning_rat=1",)
    ),
    "misspelt key of another trainer": Case(
        r"rollout\.temprature: there is no such key\. Did you mean 'rollout\.temperature'\?",
        ("actor_rollout_ref.rollout.temprature=1",),
    ),
    "value of the wrong type": Case(
        r"rollout\.n: Value 'many' of type 'str' could not be converted to Integer\.",
        ("rollout.n=many",),
    ),
    "unknown engine": Case(
        r"rollout\.name='vlm' is not one of .* Did you mean 'vllm'\?", ("rollout.name=vlm",)
    ),
    "unknown tracker": Case(
        r"trainer\.logger='consle': there is no such tracker\. Did you mean 'console'\? .*",
        ("trainer.logger=[consle]",),
    ),
    "minibatches that do not divide a step": Case(
        r"actor\.ppo_mini_batch_size=3 does not divide data\.train_batch_size=8\.",
        ("actor.ppo_mini_batch_size=3",),
    ),
    "more positions than the model has": Case(
        r"data\.max_prompt_length \+ data\.max_response_length=65 is more than "
        r"max_position_embeddings=64 of the model\. .*",
        ("data.max_prompt_length=57",),
    ),
    "tensor parallelism that does not divide the heads": Case(
        r"actor\.megatron\.tensor_model_parallel_size=3 does not divide num_attention_heads=2 .*",
        ("actor.megatron.tensor_model_parallel_size=3",),
        world_size=3,
    ),
    "expert parallelism that does not divide the experts": Case(
        r"actor\.megatron\.expert_model_parallel_size=3 does not divide num_experts=4 .*",
        ("actor.megatron.expert_model_parallel_size=3",),
        world_size=3,
    ),
    "more pipeline stages than layers": Case(
        r"actor\.megatron\.pipeline_model_parallel_size=3 times .* num_hidden_layers=2 .*",
        ("actor.megatron.pipeline_model_parallel_size=3",),
        world_size=3,
    ),
    "parallel sizes that do not divide the processes": Case(
        r"trainer\.n_gpus_per_node \* trainer\.nnodes=3 is not a multiple of tensor 2 .*",
        ("actor.megatron.tensor_model_parallel_size=2",),
        world_size=3,
    ),
    "another number of processes than configured": Case(
        r"trainer\.n_gpus_per_node \* trainer\.nnodes = 2, but 3 processes were launched\. .*",
        ("trainer.n_gpus_per_node=2",),
        world_size=3,
    ),
    "run folder of another run": Case(
        r"rollout\.n=4 differs from 5 of the run in {dir}/run, which this command would "
        r"continue\. .*",
        is_used_with=("rollout.n=5",),
    ),
    "run folder is in use and resuming is disabled": Case(
        r"{dir}/run holds a run and trainer\.resume_mode=disable\. .*",
        ("trainer.resume_mode=disable",),
        is_used_with=(),
    ),
}


def use_run_folder(run_dir: Path, argv: list[str]) -> None:
    """Leave what a run leaves that did one step."""
    config = compose_config(RunConfig, parse_command_line("train", "", argv))
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(to_yaml(config))
    (run_dir / "metrics.jsonl").write_text('{"step": 0, "reward/mean": 0.5}\n')


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str
    folder: Path
    before: dict[str, str]


@pytest.fixture(scope="module")
def outcomes(files, tmp_path_factory) -> dict[str, Outcome]:
    """What became of each case."""
    folders, asked = {}, []
    for name, case in CASES.items():
        folder = tmp_path_factory.mktemp("case")
        overrides = [text.replace("{dir}", str(folder)) for text in case.overrides]
        one_process = ["trainer.n_gpus_per_node=1", "actor.megatron.expert_model_parallel_size=1"]
        environment = {}
        if case.world_size > 1:  # as if torchrun had started so many
            one_process[0] = f"trainer.n_gpus_per_node={case.world_size}"
            environment = {"RANK": "0", "WORLD_SIZE": str(case.world_size)}
        argv = [*files.argv(folder / "run"), *one_process, *overrides]
        case.prepare(folder)
        if case.is_used_with is not None:
            use_run_folder(folder / "run", [*argv, *case.is_used_with])
        folders[name] = folder, commands.hash_files(folder)
        asked.append({"name": name, "argv": argv, "environment": environment})
    driver = Path(__file__).parent / "fork_driver.py"
    done = subprocess.run(
        [sys.executable, str(driver)],
        input=json.dumps({"model": str(files.model), "cases": asked}),
        env=commands.ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=commands.LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    return {name: Outcome(**results[name], folder=f, before=b) for name, (f, b) in folders.items()}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_exit_code_2_and_touches_nothing(outcomes, name):
    outcome = outcomes[name]
    expected = CASES[name].expected.replace("{dir}", re.escape(str(outcome.folder)))
    lines = [line for line in outcome.stderr.splitlines() if " INFO [controller 0] " not in line]
    assert len(lines) == 1, outcome.stderr
    assert re.fullmatch(f"error: {expected}", lines[0]), lines[0]
    assert outcome.code == 2
    assert outcome.stdout == ""
    assert commands.hash_files(outcome.folder) == outcome.before


def test_several_processes_say_it_once(files, tmp_path):
    """The command starts its processes itself; the mistake is one that only the inputs show."""
    argv = files.argv(tmp_path / "run", f"data.train_files={tmp_path / 'none.parquet'}")
    done = commands.run(*argv)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: {tmp_path / 'none.parquet'}: there is no such file. Check the path.\n"
    )
    assert list(tmp_path.iterdir()) == []
