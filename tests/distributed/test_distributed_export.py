"""Ranks share the reading and the writing of a checkpoint."""

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mcore_rl.errors import UserError
from mcore_rl.models.safetensors_io import CheckpointReader
from tests.actor_inputs import EP2, ETP1, PP2, TP2, actor_spec
from tests.distributed import export_cases

OTHER_FILES = ("generation_config.json", "tokenizer.json", "chat_template.jinja")


@pytest.fixture
def source(tiny_checkpoint, tmp_path):
    """A mixture of experts with all that a model folder has, and code, which is not copied."""
    folder = tmp_path / "source"
    shutil.copytree(tiny_checkpoint("qwen3_moe"), folder)
    for name in (*OTHER_FILES, "modeling.py"):
        (folder / name).write_text("{}")
    return folder


def test_every_rank_writes_shards_of_its_own_and_the_whole_is_the_model(
    processes, source, tmp_path
):
    """Proves the export in tensor, expert and pipeline parallelism over four ranks, its index, and
    that transformers reads it in the dtype it has."""
    target, max_shard_bytes = tmp_path / "exported", 4096
    spec = actor_spec(source, dtype="bfloat16", **TP2, **PP2, **EP2, **ETP1)
    written = processes.run(export_cases.export, 4, spec, str(target), max_shard_bytes)

    files = sorted(file.name for file in target.glob("*.safetensors"))
    assert len(files) > 2 * 4
    # Shard i is that of rank i modulo 4.
    assert written == [files[rank::4] for rank in range(4)]
    names = {file.name for file in target.iterdir()} - set(files)
    assert names == {"config.json", "model.safetensors.index.json", *OTHER_FILES}

    ours, theirs = CheckpointReader(target), CheckpointReader(source)
    ours.check_index()
    assert ours.names() == theirs.names()
    for name in theirs.names():
        assert torch.equal(ours.read(name), theirs.read(name).bfloat16()), name
    config = json.loads((source / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert json.loads((target / "config.json").read_text()) == config | {"dtype": "bfloat16"}
    (target / "tokenizer.json").unlink()
    read: Any = AutoModelForCausalLM.from_pretrained(target, dtype="auto", output_loading_info=True)
    model, info = read
    assert model.dtype == torch.bfloat16
    assert not any(info.values())


def test_a_rank_reads_no_more_than_what_it_holds(processes, tiny_checkpoint):
    """Proves that loading reads each tensor once over the ranks that cut it: half of it in tensor
    parallelism, all or nothing of an expert."""
    folder = tiny_checkpoint("qwen3_moe")
    by_rank = processes.run(export_cases.bytes_read, 2, actor_spec(folder, **TP2, **EP2, **ETP1))
    reader = CheckpointReader(folder)
    for name in reader.names():
        sizes = [num_bytes.get(name, 0) for num_bytes in by_rank]
        whole = reader.read(name).nbytes
        if "norm" in name or name.endswith("mlp.gate.weight"):
            assert sizes == [whole, whole], name
        elif ".experts." in name:
            assert sorted(sizes) == [0, whole], name
        else:  # one of 61 rows of the vocabulary cannot be halved
            assert sum(sizes) == whole, name
            assert abs(sizes[0] - sizes[1]) <= whole // 61, name


def test_weights_that_are_not_finite_are_refused_by_name(processes, source):
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 2] = float("nan")
    save_file(tensors, file)
    (said,) = processes.run(export_cases.refusal, 1, actor_spec(source))
    name = "model.layers.1.self_attn"
    assert said == (
        f"checkpoint={str(source)!r} holds infinities or NaN in {name}.q_proj.weight or "
        f"{name}.k_proj.weight or {name}.v_proj.weight."
    )


def test_an_export_that_cannot_be_written_names_the_file_and_is_no_model(
    processes, tiny_checkpoint, tmp_path
):
    target = tmp_path / "exported"
    args = actor_spec(tiny_checkpoint("qwen3_moe")), str(target), 20_000
    (said,) = processes.run(export_cases.failure_to_export, 1, *args)
    assert said.startswith(f"{target}/model.safetensors.tmp could not be written: ")
    assert "File too large" in said
    assert "\n" not in said
    with pytest.raises(UserError, match="safetensors"):
        CheckpointReader(target)
