"""Converted checkpoints are what Megatron would have saved, and load in every layout."""

import pytest
import torch

from mcore_rl.checkpoint_metadata import read_metadata
from mcore_rl.convert.convert import hf_to_mcore, mcore_to_hf
from mcore_rl.models.safetensors_io import CheckpointReader
from mcore_rl.torch_dist.source import TorchDistSource
from tests import actor_cases, convert_cases, poison
from tests.actor_inputs import EP2, ETP1, PP2, TP2, VPP2, actor_spec, layout_id, random_sequences
from tests.tiny_models import MODELS


@pytest.fixture(scope="module")
def converted(tiny_checkpoint, tmp_path_factory):
    """Return a function: name of a tiny checkpoint -> its distributed checkpoint, written once."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("converted") / name
            hf_to_mcore(tiny_checkpoint(name), folders[name], file_bytes=40_000)
        return folders[name]

    return folder_of


def test_keys_shapes_and_dtypes_are_those_that_megatron_saves(
    processes, tiny_checkpoint, converted
):
    """For every family, against `sharded_state_dict` of the model on one process."""
    names = list(MODELS)
    args = [str(tiny_checkpoint(name)) for name in names]
    (saved,) = processes.run(convert_cases.what_megatron_saves, 1, args)
    for name, (tensors, objects) in zip(names, saved, strict=True):
        source = TorchDistSource(converted(name))
        ours = {key: (source.shape(key), source.dtype(key)) for key in source.tensor_keys()}
        assert ours == tensors, name
        assert set(source.object_keys()) == objects, name


def test_megatron_alone_loads_every_key(processes, tiny_checkpoint, converted):
    args = str(tiny_checkpoint("qwen3_moe_mixed")), str(converted("qwen3_moe_mixed"))
    assert processes.run(convert_cases.load_all_of_it, 1, *args) == [([], [])]


def test_embeddings_that_the_metadata_calls_an_object_are_not_unpickled(
    processes, tiny_checkpoint, tmp_path
):
    """Their shape may differ from the model's, so Megatron would not find the metadata strange, and
    torch reads objects as they come."""
    hf_to_mcore(tiny_checkpoint("qwen3"), tmp_path / "mcore")
    key, called = "embedding.word_embeddings.weight", tmp_path / "called"
    (index,) = (i for i in read_metadata(tmp_path / "mcore").storage_data if i.fqn == key)
    poison.put_in_place_of(tmp_path / "mcore", index, called)
    poison.call_object(tmp_path / "mcore", key)
    args = str(tiny_checkpoint("qwen3")), str(tmp_path / "mcore")
    (said,) = processes.run(convert_cases.failure_to_load, 1, *args)
    assert not called.exists()
    assert said == f"{key} is stored as an object, and not as a tensor."


@pytest.mark.parametrize(
    ("name", "world_size", "megatron"),
    [
        ("qwen2_tied", 1, {}),
        ("qwen2_tied", 2, TP2),
        ("qwen2_tied", 2, VPP2),
        ("qwen3_moe_mixed", 2, PP2),
        ("qwen3_moe", 2, EP2),
        ("qwen3_moe", 2, TP2 | ETP1),
        ("deepseek_v3", 2, TP2 | EP2 | ETP1),
    ],
    ids=layout_id,
)
def test_a_converted_checkpoint_loads_bit_by_bit_in_any_layout(
    processes, tiny_checkpoint, converted, name, world_size, megatron
):
    args = str(tiny_checkpoint(name)), str(converted(name)), megatron
    for wrong, count in processes.run(convert_cases.names_loaded_wrongly, world_size, *args):
        assert wrong == []
        assert count > 5


@pytest.mark.parametrize(
    ("name", "world_size", "megatron"),
    [
        ("qwen2_tied", 2, PP2),
        ("qwen3", 2, TP2),
        ("qwen3_moe", 2, TP2 | EP2 | ETP1 | {"dtype": "bfloat16"}),
    ],
    ids=layout_id,
)
def test_a_training_checkpoint_becomes_the_folder_that_the_trainer_exports(
    processes, tiny_checkpoint, tmp_path, name, world_size, megatron
):
    """After two updates. The vocabulary of 61 is padded under tensor parallelism."""
    saved = tmp_path / "global_step_2"
    saved.mkdir()
    spec = actor_spec(tiny_checkpoint(name), **megatron)
    steps = [("begin_step",), ("update", random_sequences(0), actor_cases.SftObjective())]
    script = [*steps, ("begin_save", str(saved)), ("end_save",)]
    exported = processes.run(actor_cases.run_script, world_size, spec, script)[0][-1][1]

    target = tmp_path / "hf"
    mcore_to_hf(saved, target, config_from=tiny_checkpoint(name), file_bytes=20_000)
    reader = CheckpointReader(target)
    assert reader.names() == sorted(exported)
    for tensor_name, tensor in exported.items():
        assert torch.equal(reader.read(tensor_name), tensor), tensor_name
        assert reader.dtype(tensor_name) == tensor.dtype
    assert not torch.equal(
        exported["model.norm.weight"].float(),
        CheckpointReader(tiny_checkpoint(name)).read("model.norm.weight"),
    )
