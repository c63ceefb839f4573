"""Reading slices of checkpoints, and writing checkpoints shard by shard."""

import gc
import json
import resource
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore_rl.errors import UserError
from mcore_rl.models.mappings import HfTensor, ParamEntry, Replicated, Vocab
from mcore_rl.models.safetensors_io import (
    INDEX_FILE,
    SINGLE_FILE,
    CheckpointReader,
    check_checkpoint,
    copy_model_files,
    write_checkpoint,
)

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.arange(6, dtype=torch.bfloat16),
    "c": torch.arange(8, dtype=torch.float64).view(2, 4),
    "d": torch.arange(5, dtype=torch.int64),
}
NUM_BYTES = 48 + 12 + 64 + 40


def write_tensors(folder, max_shard_bytes):
    return write_checkpoint(folder, TENSORS.items(), max_shard_bytes)


@pytest.mark.parametrize(("max_shard_bytes", "num_files"), [(1, 4), (110, 2), (NUM_BYTES, 1)])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, max_shard_bytes, num_files):
    assert write_tensors(tmp_path, max_shard_bytes) == NUM_BYTES
    assert len(list(tmp_path.glob("*.safetensors"))) == num_files
    reader = CheckpointReader(tmp_path)
    assert reader.names() == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert reader.shape(name) == tensor.shape
        assert reader.dtype(name) == tensor.dtype
        assert torch.equal(reader.read(name), tensor)


def test_shards_have_the_names_and_the_index_of_the_hub(tmp_path):
    write_tensors(tmp_path, 110)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert sorted(file.name for file in tmp_path.iterdir()) == [first, second, INDEX_FILE]
    assert json.loads((tmp_path / INDEX_FILE).read_text()) == {
        "metadata": {"total_size": NUM_BYTES},
        "weight_map": {"a": first, "b": first, "c": second, "d": second},
    }


def test_a_shard_never_exceeds_the_limit_unless_one_tensor_does(tmp_path):
    write_tensors(tmp_path, 60)
    sizes = [
        {name: tensor.nbytes for name, tensor in load_file(file).items()}
        for file in tmp_path.glob("*.safetensors")
    ]
    assert all(sum(shard.values()) <= 60 or len(shard) == 1 for shard in sizes)
    assert any(sum(shard.values()) > 60 for shard in sizes)


def num_alive_like(tensor):
    return sum(type(obj) is torch.Tensor and obj.shape == tensor.shape for obj in gc.get_objects())


def test_the_writer_holds_one_shard_and_copies_what_it_is_given(tmp_path):
    """The source reuses one buffer, and counts what is alive and on disk when asked for more."""
    num_tensors, buffer = 8, torch.empty(1021)

    def reuse_buffer():
        for i in range(num_tensors):
            # Two tensors make a shard, which is written when the third arrives.
            assert len(list(tmp_path.iterdir())) == max(0, i - 1) // 2
            assert num_alive_like(buffer) <= 2 + 1
            yield f"t{i}", buffer.fill_(i)

    write_checkpoint(tmp_path, reuse_buffer(), max_shard_bytes=2 * buffer.nbytes)
    reader = CheckpointReader(tmp_path)
    assert all((reader.read(f"t{i}") == i).all() for i in range(num_tensors))


def test_views_and_transposes_are_written_as_what_they_show(tmp_path):
    square = torch.arange(9.0).view(3, 3)
    write_checkpoint(tmp_path, [("transposed", square.T), ("column", square[:, 1])])
    reader = CheckpointReader(tmp_path)
    assert torch.equal(reader.read("transposed"), square.T)
    assert torch.equal(reader.read("column"), square[:, 1])


def test_a_writer_that_dies_leaves_no_checkpoint_and_the_next_one_succeeds(tmp_path):
    def die_after(count):
        yield from list(TENSORS.items())[:count]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, die_after(3), max_shard_bytes=1)
    with pytest.raises(UserError, match="has neither"):
        CheckpointReader(tmp_path)
    write_tensors(tmp_path, NUM_BYTES)
    assert [file.name for file in tmp_path.iterdir()] == [SINGLE_FILE]


def test_weights_are_never_written_over(tmp_path):
    write_tensors(tmp_path, 110)
    with pytest.raises(UserError, match="already holds"):
        write_tensors(tmp_path, 110)


def test_a_slice_of_a_large_tensor_costs_only_its_pages(tmp_path):
    num_rows, num_cols = 2**20, 256  # 1 GiB of float32, a hole on disk
    spec = {"dtype": "F32", "shape": [num_rows, num_cols], "data_offsets": [0, 2**30]}
    header = json.dumps({"x": spec}).encode()
    header += b" " * (-len(header) % 8)
    with open(tmp_path / SINGLE_FILE, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2**30)
    reader = CheckpointReader(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    part = reader.read("x", (500_000, 500_010), (0, 128)).clone()
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert part.shape == (10, 128)
    assert reader.shape("x") == (num_rows, num_cols)
    assert grown_kib < 64 * 1024  # the whole tensor would be 1024 * 1024


def test_rows_and_columns_are_sliced(tmp_path):
    write_tensors(tmp_path, NUM_BYTES)
    reader = CheckpointReader(tmp_path)
    assert torch.equal(reader.read("a", (1, 3), (2, 4)), TENSORS["a"][1:3, 2:4])
    assert torch.equal(reader.read("b", (1, 3)), TENSORS["b"][1:3])
    assert reader.read("a", (3, 3)).shape == (0, 4)


def test_a_missing_tensor_is_answered_with_the_closest_name(tmp_path):
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / SINGLE_FILE)
    with pytest.raises(UserError, match=r"no tensor 'model.norm.wieght'. Did you mean 'model.norm"):
        CheckpointReader(tmp_path).read("model.norm.wieght")


def test_a_missing_shard_is_named_before_anything_is_read(tmp_path):
    write_tensors(tmp_path, 110)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of the shards .* \['model-00002-of-00002"):
        CheckpointReader(tmp_path)


def test_a_tensor_that_the_index_promises_and_the_shard_lacks_is_named(tmp_path):
    write_tensors(tmp_path, 110)
    save_file({"c": TENSORS["c"]}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match=r"00002-of-00002.safetensors lacks 'd'"):
        CheckpointReader(tmp_path).shape("d")


def test_a_truncated_file_is_named(tmp_path):
    write_tensors(tmp_path, NUM_BYTES)
    file = tmp_path / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model.safetensors is damaged or cut short"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(UserError, match="is not an index of a checkpoint"):
        CheckpointReader(tmp_path)


ENTRIES = [
    ParamEntry(megatron_name="embedding", mapping=Vocab(HfTensor("embed", (5, 2)))),
    ParamEntry(megatron_name="norm", mapping=Replicated(HfTensor("norm", (2,)))),
]


def reader_of(folder, **shapes):
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / SINGLE_FILE)
    return CheckpointReader(folder)


def test_a_checkpoint_must_hold_what_the_model_needs_and_nothing_else(tmp_path):
    good = {"embed": (5, 2), "norm": (2,)}
    check_checkpoint(reader_of(tmp_path, **good), ENTRIES)
    ignored = {"lm_head.weight": (5, 2), "model.layers.0.rotary_emb.inv_freq": (4,)}
    check_checkpoint(reader_of(tmp_path, **good | ignored), ENTRIES)
    extra = reader_of(tmp_path, **good | {"model.layers.7.norm": (2,)})
    check_checkpoint(extra, ENTRIES, ("model.layers.7.",))
    with pytest.raises(UserError, match=r"has 1 tensors .* \['model\.layers\.7\.norm'\]"):
        check_checkpoint(extra, ENTRIES, ("model.layers.77.",))
    with pytest.raises(UserError, match="no tensor 'norm'"):
        check_checkpoint(reader_of(tmp_path, embed=(5, 2)), ENTRIES)
    with pytest.raises(UserError, match=r"shape of embed=\(6, 2\) is not \(5, 2\)"):
        check_checkpoint(reader_of(tmp_path, embed=(6, 2), norm=(2,)), ENTRIES)
    with pytest.raises(UserError, match=r"has 1 tensors .* \['bias'\]"):
        check_checkpoint(reader_of(tmp_path, **good, bias=(2,)), ENTRIES)


def test_model_files_are_copied_without_weights_and_code(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    kept = ["chat_template.jinja", "config.json", "merges.txt", "tokenizer.json", "vocab.json"]
    for name in [*kept, "modeling_custom.py", SINGLE_FILE, INDEX_FILE, "README.md"]:
        (source / name).write_text(name)
    assert copy_model_files(source, target) == kept
    assert sorted(file.name for file in target.iterdir()) == kept
    assert all((target / name).read_text() == name for name in kept)


def test_model_files_are_not_copied_into_a_folder_in_use_unless_told(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for folder, text in ((source, "new"), (target, "old")):
        folder.mkdir()
        (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="is not empty"):
        copy_model_files(source, target)
    assert (target / "config.json").read_text() == "old"
    copy_model_files(source, target, overwrite=True)
    assert (target / "config.json").read_text() == "new"
