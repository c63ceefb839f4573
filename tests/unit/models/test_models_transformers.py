"""Checkpoints that transformers writes are read, and ours are read by transformers."""

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mcore_rl.convert.convert import hf_to_mcore
from mcore_rl.errors import UserError
from mcore_rl.models import spec
from mcore_rl.models.mappings import hf_shapes, to_hf, to_megatron
from mcore_rl.models.reference import build_reference
from mcore_rl.models.safetensors_io import (
    SINGLE_FILE,
    CheckpointReader,
    check_checkpoint,
    copy_model_files,
    plan_shards,
    write_checkpoint,
)
from mcore_rl.models.spec import check_weights, load_hf_config, model_family


def save_random_model(config, folder):
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


def test_entries_name_exactly_the_tensors_that_save_pretrained_writes(hf_config, tmp_path):
    save_random_model(hf_config, tmp_path)
    config = load_hf_config(tmp_path)
    entries = model_family(config).entries(config)
    reader = CheckpointReader(tmp_path)
    check_checkpoint(reader, entries)
    expected = {name: shape for entry in entries for name, shape in hf_shapes(entry).items()}
    assert {name: reader.shape(name) for name in reader.names()} == expected


def test_a_converted_checkpoint_is_the_same_model_in_transformers(hf_config, tmp_path):
    """Hugging Face -> two ranks of Megatron -> Hugging Face, in shards, all through files.

    Proves that names and values survive; says nothing of Megatron's own forward pass.
    """
    source, target = tmp_path / "source", tmp_path / "target"
    model = save_random_model(hf_config, source)
    config = load_hf_config(source)
    reader = CheckpointReader(source)
    copy_model_files(source, target)
    tensors = [
        named_tensor
        for entry in model_family(config).entries(config)
        for named_tensor in to_hf(
            entry, [to_megatron(entry, rank, 2, reader.read) for rank in range(2)]
        ).items()
    ]
    write_checkpoint(target, tensors, plan_shards(tensors, max_shard_bytes=8192))
    assert len(list(target.glob("*.safetensors"))) > 2
    read: Any = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    converted, info = read
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    weights = converted.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    token_ids = torch.randint(0, config.vocab_size, (2, 7))
    with torch.no_grad():
        found, expected = converted(token_ids).logits, model.eval()(token_ids).logits
    # Every bit of the weights is the same, but the BLAS sums in another order where from_pretrained
    # placed a weight at another alignment: float32, observed differences of 1e-7.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def tied_with(tiny_checkpoint, tmp_path):
    """Return a function: embedding -> output layer; it gives the folder of a tied model which holds
    that output layer too."""

    def write(output_layer_of):
        folder = tmp_path / "tied"
        shutil.copytree(tiny_checkpoint("qwen2_tied"), folder)
        tensors = load_file(folder / SINGLE_FILE)
        tensors["lm_head.weight"] = output_layer_of(tensors["model.embed_tokens.weight"])
        save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})
        return folder

    return write


def other_last_number(embedding):
    changed = embedding.clone()
    changed[-1, -1] += 1
    return changed


@pytest.mark.parametrize(
    "output_layer_of",
    [torch.randn_like, other_last_number, lambda embedding: embedding[:-1].clone()],
    ids=["random", "one number", "fewer rows"],
)
def test_a_tied_model_with_an_output_layer_of_its_own_is_refused(
    tied_with, tmp_path, monkeypatch, output_layer_of
):
    """transformers would use it, whatever the configuration says."""
    monkeypatch.setattr(spec, "_ROWS_AT_ONCE", 8)  # the last of 61 rows are a part of a slice
    folder = tied_with(output_layer_of)
    line = (
        r"tie_word_embeddings=True would lose lm_head\.weight, which differs from "
        r"model\.embed_tokens\.weight\. Set tie_word_embeddings=false there\."
    )
    with pytest.raises(UserError, match=line):
        check_weights(folder, load_hf_config(folder))
    with pytest.raises(UserError, match=line):
        hf_to_mcore(folder, tmp_path / "mcore")


def test_a_tied_model_may_hold_its_embedding_twice(tied_with, monkeypatch):
    monkeypatch.setattr(spec, "_ROWS_AT_ONCE", 8)
    folder = tied_with(torch.clone)
    check_weights(folder, load_hf_config(folder))


def test_code_that_a_model_brings_is_not_run(tiny_checkpoint, tmp_path):
    """Its files ask for it as the hub's do; what transformers and Megatron have of the family is
    taken instead, without a question at the terminal."""
    folder, called = tmp_path / "model", tmp_path / "called"
    shutil.copytree(tiny_checkpoint("qwen3"), folder)
    called_by = f"from pathlib import Path\nPath({str(called)!r}).touch()\n"
    for name, text in {"configuration": "Config", "modeling": "Model"}.items():
        (folder / f"{name}.py").write_text(f"{called_by}class {text}: pass\n")
    of_model = {
        "AutoConfig": "configuration.Config",
        "AutoModelForCausalLM": "modeling.Model",
    }
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": of_model}))
    assert type(load_hf_config(folder)).__name__ == "Qwen3Config"
    assert type(build_reference(folder, torch.float32)).__name__ == "Qwen3ForCausalLM"
    assert not called.exists()
