"""Checkpoints that transformers writes are read, and ours are read by transformers."""

import torch
from transformers import AutoModelForCausalLM

from mcore_rl.models.mappings import hf_shapes, to_hf, to_megatron
from mcore_rl.models.safetensors_io import (
    CheckpointReader,
    check_checkpoint,
    copy_model_files,
    plan_shards,
    write_checkpoint,
)
from mcore_rl.models.spec import load_hf_config, model_family


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
    converted, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
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
