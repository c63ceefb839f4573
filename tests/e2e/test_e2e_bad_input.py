"""Bad input to the real command: exit code 2, one line that names the culprit, nothing touched.

A case ends before any worker has begun to work.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from mcore_rl.config.compose import compose_config, parse_command_line, to_yaml
from mcore_rl.config.run import RunConfig
from mcore_rl.models.mappings import hf_shapes
from mcore_rl.models.spec import load_hf_config, model_family
from tests.e2e import commands

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


def weights(cut_short: Any = False, **shapes: tuple[int, ...]) -> Callable[[Path], object]:
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
        r"config\.json: model_type='gpt9' is none of the supported families: .*qwen3_moe.*\.",
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
    "second data file is missing": Case(
        r"{dir}/none\.json: there is no such file\. .*",
        ("data.train_files=[{dir}/bad.json,{dir}/none.json]",),
        json_rows(ROW),
    ),
    "validation file is missing": Case(
        r"{dir}/none\.parquet: there is no such file\. .*", ("data.val_files={dir}/none.parquet",)
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
        r"bad\.json:7: data_source='riddles': there is no such reward\..*"
        r"custom_reward_function\.path.*",
        (BAD_JSON, NO_CUSTOM_REWARD),
        json_rows(*[ROW] * 7, ROW | {"data_source": "riddles"}),
    ),
    "groups compared by a number that the reward does not give": Case(
        r"algorithm\.filter_groups\.metric='accuracy' is no number of the reward of "
        r"data_source='arithmetic'\. Did you mean 'acc'\? Every reward gives score, acc, .*",
        (
            NO_CUSTOM_REWARD,
            "algorithm.filter_groups.enable=true",
            "algorithm.filter_groups.metric=accuracy",
        ),
    ),
    "best checkpoint by data that is not validated on": Case(
        r"trainer\.best_ckpt_metric='eval/gsm8k/accuracy' is of no data source in "
        r"data\.val_files, whose metrics begin with eval/arithmetic/\. .*",
        ("trainer.max_ckpt_to_keep=1", "trainer.best_ckpt_metric=eval/gsm8k/accuracy"),
    ),
    "template variable that the template does not read": Case(
        r"data\.apply_chat_template_kwargs\.enable_thinkin: the model's chat template reads no .*",
        ("data.apply_chat_template_kwargs.enable_thinkin=false",),
    ),
    "model of the hub that is not in its cache": Case(
        r"model\.path='nobody/none' is no folder here, and the cache .* set HF_HUB_OFFLINE=0 .*",
        ("model.path=nobody/none",),
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


def raw(content: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(content)


def rows(*changes: dict) -> Callable[[Path], object]:
    """Return a function that writes JSON lines: a good row, and it with each of the changes."""
    lines = [json.dumps(ROW | change) for change in ({}, *changes)]
    return lambda file: file.write_text("\n".join(lines))


def table(*columns: tuple[str, pa.Array]) -> Callable[[Path], object]:
    """Return a function that writes Parquet."""
    made = pa.table([array for _, array in columns], names=[name for name, _ in columns])
    return lambda file: pq.write_table(made, file)


def good_columns(num_rows: int) -> list[tuple[str, pa.Array]]:
    return [(name, pa.array([value] * num_rows)) for name, value in ROW.items()]


def cut_table(length: int) -> Callable[[Path], object]:
    def write(file: Path) -> None:
        table(*good_columns(50))(file)
        file.write_bytes(file.read_bytes()[:length])

    return write


def split_folder(*names: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        folder.mkdir()
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            rows()(folder / name)

    return write


MESSAGE = {"role": "user", "content": "1+1="}
LINE_ERROR = r" line 2: is not valid JSON \(.*\)\. A file holds one array of objects, or one .*"
PROMPT = r" row 1, column 'prompt': "
BAD_DATA: dict[str, tuple[str, Callable[[Path], object]]] = {
    "missing": (r": there is no such file\. Check the path\.", lambda file: None),
    "nothing": (r": holds no rows\. .*", raw(b"")),
    "blank lines": (r": holds no rows\. .*", raw(b"\n  \n\r\n")),
    "no elements": (r": holds no rows\. .*", raw(b"[]")),
    "table without rows": (r": holds no rows\. .*", table(*good_columns(0))),
    "CSV": (r": is neither Parquet nor .* Write it as one of these\.", raw(b"prompt,answer\n1,2")),
    "a number": (r": is neither Parquet nor .*", raw(b"17")),
    "zeros": (r": is neither Parquet nor .*", raw(bytes(100))),
    "a picture": (r": is neither Parquet nor .*", raw(b"\x89PNG\r\n\x1a\n" + bytes(50))),
    "gzip": (r": is compressed \(gzip\)\. Unpack it\.", raw(gzip.compress(b"[]"))),
    "byte-order mark": (r": begins with a byte-order mark\. Save .*", raw(b"\xef\xbb\xbf[]")),
    "UTF-16": (r": is UTF-16\. Save it as UTF-8 .*", raw("[]".encode("utf-16"))),
    "table cut short": (r": is damaged Parquet \(.*\)\. Write it again\.", cut_table(300)),
    "table cut to its head": (r": is damaged Parquet \(.*\)\. .*", cut_table(4)),
    "one column twice": (
        r": has the column 'prompt' twice\. Rename one of them\.",
        table(*good_columns(2), ("prompt", pa.array(["a", "b"]))),
    ),
    "a date that Python has not": (
        r" row 1, column 'when': cannot be read \(.*\)\.",
        table(*good_columns(2), ("when", pa.array([0, 2**60], pa.timestamp("us")))),
    ),
    "text that is no UTF-8 in a table": (
        r" row 1, column 'note': the text is not valid UTF-8 .*",
        table(*good_columns(2), ("note", pa.array([b"a", b"\xff"], pa.binary()).view(pa.string()))),
    ),
    "bytes as prompts": (
        r" row 0, column 'prompt': a value of type bytes where a string is expected\. .*",
        table(*good_columns(1)[::2], ("prompt", pa.array([b"1+1="]))),
    ),
    "Latin-1": (r": is not valid UTF-8 .* Save it as UTF-8\.", raw(b'[{"prompt": "\xe9"}]')),
    "a line that is no UTF-8": (
        r" line 2: is not valid UTF-8 .* Save it as UTF-8\.",
        raw(json.dumps(ROW).encode() + b'\n{"prompt": "\xff"}'),
    ),
    "a line cut short": (LINE_ERROR, raw(json.dumps(ROW).encode() + b'\n{"prompt": ')),
    "an object over several lines": (
        r" line 1: is not valid JSON .* one object per line\.",
        raw(json.dumps(ROW, indent=1).encode()),
    ),
    "single quotes": (LINE_ERROR, raw(json.dumps(ROW).encode() + b"\n{'prompt': '1+1='}")),
    "a comma too many": (r": is not valid JSON .*", raw(b'[{"prompt": "1+1="},]')),
    "nested too deep": (r": is not valid JSON .*", raw(b"[" * 100_000)),
    "a number of 5000 digits": (
        LINE_ERROR,
        raw(json.dumps(ROW).encode() + b'\n{"a": 1%b}' % (b"0" * 5000)),
    ),
    "one key twice": (
        r" line 2: is not valid JSON \(an object has the key 'prompt' twice\)\. .*",
        raw(json.dumps(ROW).encode() + b'\n{"prompt": "a", "prompt": "b"}'),
    ),
    "an array of arrays": (r" row 0: is a value of type list, not a JSON object\.", raw(b"[[1]]")),
    "a line that is null": (
        r" line 2: is a value of type NoneType, .*",
        raw(json.dumps(ROW).encode() + b"\nnull"),
    ),
    "rows under a key": (
        r" row 0, column 'prompt': there is no value; columns are \['data'\]\. .*",
        raw(json.dumps({"data": [ROW]}).encode()),
    ),
    "null as prompt": (PROMPT + r"there is no value; .*", rows({"prompt": None})),
    "NaN as prompt": (PROMPT + r"there is no value; .*", rows({"prompt": math.nan})),
    "a number as prompt": (PROMPT + r"a value of type int where a string .*", rows({"prompt": 3})),
    "an object as prompt": (PROMPT + r"a value of type dict where .*", rows({"prompt": MESSAGE})),
    "an empty prompt": (PROMPT + r"the text is empty\. .*", rows({"prompt": ""})),
    "no messages": (PROMPT + r"the list of messages is empty\.", rows({"prompt": []})),
    "token ids as messages": (PROMPT + r"message 0 is no object\. .*", rows({"prompt": [5, 6]})),
    "messages in a list": (PROMPT + r"message 0 is no object\. .*", rows({"prompt": [[MESSAGE]]})),
    "no role": (
        PROMPT + r"a value of type NoneType where a string is expected\. Message 1 must be .*",
        rows({"prompt": [MESSAGE, {"content": "x"}]}),
    ),
    "parts as content": (
        PROMPT + r"a value of type list where a string is expected\. Message 0 must be .*",
        rows({"prompt": [MESSAGE | {"content": [{"type": "text", "text": "x"}]}]}),
    ),
    "half a surrogate pair": (
        PROMPT + r"the text is not valid UTF-8 .*",
        rows({"prompt": "\ud800"}),
    ),
    "a prompt too long": (
        PROMPT + r"45 tokens, more than data\.max_prompt_length=16\. .*data\.truncation=left.*",
        rows({"prompt": "1+" * 20}),
    ),
    "a prompt of a megabyte": (PROMPT + r"\d+ tokens, more than .*", rows({"prompt": "1" * 2**20})),
    "no ground truth": (
        r" row 1, column 'ground_truth': there is no value, nor one at reward_model.* It is the .*",
        rows({"ground_truth": None}),
    ),
    "NaN as ground truth": (
        r" row 1, column 'ground_truth': there is no value, .*",
        rows({"ground_truth": math.nan}),
    ),
    "infinity as ground truth": (
        r" row 1, column 'ground_truth': inf is no number\. .*",
        rows({"ground_truth": math.inf}),
    ),
    "text as reward_model": (
        r" row 1, column 'reward_model': a value of type str where an object is expected\.",
        rows({"ground_truth": None, "reward_model": "rule"}),
    ),
    "a list as extra_info": (
        r" row 1, column 'extra_info': a value of type list where an object is expected\.",
        rows({"extra_info": [1]}),
    ),
    "no data source": (
        r" row 1, column 'data_source': there is no value; .* It names the reward, such as .*",
        rows({"data_source": None}),
    ),
    "a number as data source": (
        r" row 1, column 'data_source': a value of type int .*",
        rows({"data_source": 3}),
    ),
    "an empty folder": (
        r": {dir}/bad\.json holds no Parquet or JSON file of the split 'train'\. .*",
        split_folder(),
    ),
    "a folder with two configurations": (
        r": the split 'train' is in a, b\. Name one of them after a colon, .*",
        split_folder("a/train.json", "b/train.json"),
    ),
    "a link to itself": (r": there is no such file\. .*", lambda file: file.symlink_to(file)),
}
"""What is wrong with a file: the message after its name, and a function that writes it."""
CASES |= {
    f"data: {name}": Case(
        "{dir}/bad\\.json" + rest,
        (BAD_JSON,),
        lambda folder, write=write: write(folder / "bad.json"),
    )
    for name, (rest, write) in BAD_DATA.items()
}

NO_ASSIGNMENT = r".* is not of the form key=value .*"
BAD_COMMAND_LINES: dict[str, str] = {
    "rollout.n": NO_ASSIGNMENT,
    "=3": r"'=3' is not of the form key=value: it has no key\.",
    "rollout..n=3": NO_ASSIGNMENT,
    "rollout.n==3": NO_ASSIGNMENT,
    "data.train_files='a.parquet": NO_ASSIGNMENT
    + r"Quote the value for both the shell and Hydra .*",
    "data.train_files=[a.parquet": NO_ASSIGNMENT,
    "rollout.n=2,4": r"'rollout\.n=2,4' is a sweep\. Quote the value if the commas belong to it\.",
    "rollout.n=range(1,4)": r".* is a sweep\. .*",
    "~rollout.n": r"'~rollout\.n' changes which keys there are\. Only key=value is taken\.",
    "--shuffle": r"unrecognized arguments: --shuffle\. See python -m mcore_rl\.train --help\.",
    "--config-name": r"argument --config-name.*: expected one argument\. .*",
    "--config-name=gmpoo": r"--config-name gmpoo: there is no such recipe .*'gmpo'\?.*",
    "--config-dir=/none": r"--config-dir /none: there is no such folder\.",
    "actor.optim.learning_rat=1": r"actor\.optim\.learning_rat: there is no such key\..*",
    "actor_rollout_ref.rollout.temprature=1": (
        r"rollout\.temprature: there is no such key\. Did you mean 'rollout\.temperature'\?"
    ),
    "reward_model.enable=True": (
        r"reward_model\.enable=True has no equivalent here\. Score by functions: .*"
    ),
    "actor_rollout_ref.model.override_config.num_layers=2": (
        r"model\.override_config\.num_layers=2 has no equivalent here\. Change config\.json in .*"
    ),
    "rollout.response_length=7": (
        r"data\.max_response_length and rollout\.response_length set data\.max_response_length .*"
    ),
    "rollout.n=many": r"rollout\.n: Value 'many' of type 'str' could not be converted to Integer\.",
    "rollout.n=1.5": r"rollout\.n: Value '1\.5' of type 'float' could not be converted .*",
    "rollout.n=null": r"rollout\.n: Incompatible value 'None' for field of type 'int'\.",
    "rollout.n=-1": r"rollout\.n=-1 must be at least 1\.",
    "rollout.n=${rollout.n}": r"rollout\.n: Recursive interpolation detected\.",
    "data.shuffle=maybe": r"data\.shuffle: Value 'maybe' is not a valid bool .*",
    "data.train_batch_size=-8": r"data\.train_batch_size=-8 must be > 0\.",
    "data.train_batch_size=1%s"
    % ("0" * 30): r"data\.train_batch_size=10+ is more than the 32 rows .*",
    "data.train_files=": r"data\.train_files='' must be a path or a list of paths\.",
    "data.train_files=[]": r"data\.train_files=\[\] must be a path or a list of paths\.",
    "data.train_files=[1,2]": r"data\.train_files=\[1, 2\] must be a path or a list of paths\.",
    f"data.train_files={'a' * 5000}": r"a+: there is no such file\. Check the path\.",
    "data.train_files=someone/no-such-set@test": (
        r"someone/no-such-set@test: there is no such file, and the cache .* set HF_HUB_OFFLINE=0 .*"
    ),
    "data.train_files='a\nb'": r"a\\nb: there is no such file\. Check the path\.",
    "data.prompt_key=question": (
        r".*/train\.parquet row 0, column 'question': there is no value; columns are "
        r"\['data_source', 'prompt', 'ground_truth'\]\. .* data\.prompt_key names the column\."
    ),
    "data.truncation=lft": r"data\.truncation='lft' is not one of .* Did you mean 'left'\?",
    "actor.optim.lr=nan": r"actor\.optim\.lr=nan must be > 0\.",
    "actor.entropy_coeff=nan": r"actor\.entropy_coeff=nan is not finite\.",
    "rollout.temperature=1e999": r"rollout\.temperature=inf is not finite\.",
    "rollout.name=vlm": r"rollout\.name='vlm' is not one of .* Did you mean 'vllm'\?",
    "trainer.logger=[consle]": (
        r"trainer\.logger='consle': there is no such tracker\. Did you mean 'console'\? .*"
    ),
    "trainer.n_gpus_per_node=1000000": r"trainer\.n_gpus_per_node=1000000 is more than 128\.",
    "trainer.default_local_dir=": r"trainer\.default_local_dir='' is not set\. Name a folder\.",
    "trainer.default_local_dir=/dev/null/x": (
        r"trainer\.default_local_dir='/dev/null/x' cannot be made a folder \(Not a directory\)\. .*"
    ),
    "actor.megatron.override_transformer_config=3": (
        r"actor\.megatron\.override_transformer_config: Cannot assign int to Dict\[str, Any\]\."
    ),
}
"""One argument too many: the message."""
CASES |= {
    f"argument: {argument[:60]}": Case(expected, (argument,))
    for argument, expected in BAD_COMMAND_LINES.items()
}


def use_run_folder(run_dir: Path, argv: list[str]) -> None:
    """Leave what a run leaves that did one step."""
    config = compose_config(RunConfig, parse_command_line("train", "", argv))
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(to_yaml(config))
    (run_dir / "metrics.jsonl").write_text('{"step": 0, "reward/mean": 0.5}\n')
    (run_dir / "run.lock").write_text("process 7 on node-3")


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str
    folder: Path
    before: dict[str, str]


@pytest.fixture(scope="module")
def outcomes(files, prepared, tmp_path_factory) -> dict[str, Outcome]:
    """What became of each case."""
    found = {}
    for name, case in CASES.items():
        folder = tmp_path_factory.mktemp("case")
        overrides = [text.replace("{dir}", str(folder)) for text in case.overrides]
        one_process = ["trainer.n_gpus_per_node=1", "actor.megatron.expert_model_parallel_size=1"]
        one_process[0] = f"trainer.n_gpus_per_node={case.world_size}"
        argv = [*files.argv(folder / "run"), *one_process, *overrides]
        case.prepare(folder)
        if case.is_used_with is not None:
            use_run_folder(folder / "run", [*argv, *case.is_used_with])
        before = commands.hash_files(folder)
        done = prepared.run(*argv)
        found[name] = Outcome(done.returncode, done.stdout, done.stderr, folder, before)
    return found


@pytest.mark.timeout(4 * commands.LIMIT_S)
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


@pytest.mark.timeout(commands.TEST_LIMIT_S)
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
