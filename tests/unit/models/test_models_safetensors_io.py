"""Reading slices of checkpoints, and writing checkpoints shard by shard."""

import gc
import json
import re
import resource
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore_rl.errors import CheckpointError, UserError
from mcore_rl.models.mappings import HfTensor, ParamEntry, Replicated, Vocab
from mcore_rl.models.safetensors_io import (
    INDEX_FILE,
    SINGLE_FILE,
    CheckpointReader,
    begin_checkpoint,
    check_checkpoint,
    copy_model_files,
    finish_checkpoint,
    plan_shards,
    write_checkpoint,
    write_config_dtype,
    write_shards,
)
from tests.file_limit import files_no_longer_than

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.arange(6, dtype=torch.bfloat16),
    "c": torch.arange(8, dtype=torch.float64).view(2, 4),
    "d": torch.arange(5, dtype=torch.int64),
}
NUM_BYTES = 48 + 12 + 64 + 40


def write_tensors(folder, max_shard_bytes):
    write_checkpoint(folder, TENSORS.items(), plan_shards(TENSORS.items(), max_shard_bytes))


@pytest.mark.parametrize(("max_shard_bytes", "num_files"), [(1, 4), (110, 2), (NUM_BYTES, 1)])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, max_shard_bytes, num_files):
    write_tensors(tmp_path, max_shard_bytes)
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


def test_weights_may_be_read_by_whom_the_umask_lets(tmp_path):
    write_tensors(tmp_path, 110)
    (tmp_path / "plain").touch()
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1


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


@pytest.fixture
def only_new_objects():
    """Have `gc.get_objects` leave out the million that were there before the test."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("num_writers", [1, 2, 3])
def test_a_writer_holds_one_shard_and_copies_what_it_is_given(tmp_path, num_writers):
    """The source reuses one buffer, and counts what is alive and on disk when asked for more."""
    num_tensors, buffer = 12, torch.empty(1021)
    names = [f"t{i}" for i in range(num_tensors)]
    shards = plan_shards([(name, buffer) for name in names], max_shard_bytes=2 * buffer.nbytes)
    assert len(shards) == 6

    def reuse_buffer(writer):
        already = writer * len(shards) // num_writers
        for i, name in enumerate(names):
            # Two tensors make a shard; each round of as many shards as writers is written at its
            # end by all of them.
            rounds = i // (2 * num_writers)
            assert len(list(tmp_path.iterdir())) == already + rounds
            assert num_alive_like(buffer) <= 2 + 1
            yield name, buffer.fill_(i)

    begin_checkpoint(tmp_path)
    for writer in range(num_writers):
        write_shards(tmp_path, reuse_buffer(writer), shards, writer, num_writers)
    finish_checkpoint(tmp_path, shards)
    reader = CheckpointReader(tmp_path)
    reader.check_index()
    assert all((reader.read(name) == i).all() for i, name in enumerate(names))


def test_more_writers_than_shards_write_what_one_writes(tmp_path):
    write_tensors(tmp_path / "alone", 110)
    shards = plan_shards(TENSORS.items(), 110)
    begin_checkpoint(tmp_path / "shared")
    for writer in reversed(range(5)):
        with pytest.raises(UserError, match="has neither"):
            CheckpointReader(tmp_path / "shared")
        write_shards(tmp_path / "shared", TENSORS.items(), shards, writer, 5)
    finish_checkpoint(tmp_path / "shared", shards)
    alone, shared = (
        {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()}
        for folder in ("alone", "shared")
    )
    assert alone == shared


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["a", "c", "b", "d"], "c comes where the plan has b"),
        (["a", "b", "c", "d", "a"], "more tensors than the plan has"),
    ],
)
def test_tensors_that_are_not_those_of_the_plan_are_refused(tmp_path, given, said):
    shards = plan_shards(TENSORS.items(), 110)
    with pytest.raises(AssertionError, match=said):
        write_checkpoint(tmp_path, [(name, TENSORS[name]) for name in given], shards)
    assert not (tmp_path / INDEX_FILE).exists()


def test_a_tensor_of_another_size_than_planned_is_refused(tmp_path):
    tensors = TENSORS | {"b": TENSORS["b"].float()}
    with pytest.raises(AssertionError, match=r"model\.safetensors"):
        write_checkpoint(tmp_path, tensors.items(), plan_shards(TENSORS.items()))
    assert not (tmp_path / SINGLE_FILE).exists()


def test_a_file_that_cannot_be_written_is_named_and_there_is_no_checkpoint(tmp_path):
    tensors = {"small": torch.ones(9), "large": torch.ones(5000)}
    shards = plan_shards(tensors.items(), 1000)
    with (
        files_no_longer_than(4096),
        pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors.tmp could not be"),
    ):
        write_checkpoint(tmp_path, tensors.items(), shards)
    with pytest.raises(UserError, match="has neither"):
        CheckpointReader(tmp_path)


def test_views_and_transposes_are_written_as_what_they_show(tmp_path):
    square = torch.arange(9.0).view(3, 3)
    tensors = [("transposed", square.T), ("column", square[:, 1])]
    write_checkpoint(tmp_path, tensors, plan_shards(tensors))
    reader = CheckpointReader(tmp_path)
    assert torch.equal(reader.read("transposed"), square.T)
    assert torch.equal(reader.read("column"), square[:, 1])


def test_a_writer_that_dies_leaves_no_checkpoint_and_the_next_one_succeeds(tmp_path):
    def die_after(count):
        yield from list(TENSORS.items())[:count]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, die_after(3), plan_shards(TENSORS.items(), 1))
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


def other_index(folder, **changed):
    file = folder / INDEX_FILE
    index = json.loads(file.read_text())
    weight_map = {k: v for k, v in (index["weight_map"] | changed).items() if v is not None}
    file.write_text(json.dumps(index | {"weight_map": weight_map}))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"b": None}, f"{FIRST} holds 'b', which the index does not name."),
        ({"b": SECOND}, f"{FIRST} holds 'b', which the index places in {SECOND}."),
        ({"e": SECOND}, f"{SECOND} lacks 'e', which the index says it holds."),
    ],
)
def test_an_index_that_is_not_that_of_the_shards_is_refused(tmp_path, changed, line):
    write_tensors(tmp_path, 110)
    reader = CheckpointReader(tmp_path)
    reader.check_index()
    other_index(tmp_path, **changed)
    with pytest.raises(UserError, match=re.escape(line)):
        CheckpointReader(tmp_path).check_index()


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    write_tensors(tmp_path, 110)
    save_file({name: TENSORS[name] for name in "bcd"}, tmp_path / SECOND)
    with pytest.raises(UserError, match=f"{SECOND} holds 'b', which the index places in {FIRST}"):
        CheckpointReader(tmp_path).check_index()


def test_a_truncated_shard_is_named_before_its_tensors_are_read(tmp_path):
    write_tensors(tmp_path, 110)
    file = tmp_path / SECOND
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=f"{SECOND} is damaged or cut short"):
        CheckpointReader(tmp_path).check_index()


def test_a_truncated_file_is_named(tmp_path):
    write_tensors(tmp_path, NUM_BYTES)
    file = tmp_path / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model.safetensors is damaged or cut short"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", '{"weight_map": 3}', "{}", '{"weight_map": {"a": 3}}'),
        '{"weight_map": ' + '{"a":' * 10**5 + "1" + "}" * 10**5 + "}",
        '{"weight_map": {"a": "../other/model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
    ],
)
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
    # That the output layer is that of the model is proven where `check_weights` is.
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


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"a": 1, "dtype": "float32", "b": "x"}, {"a": 1, "dtype": "bfloat16", "b": "x"}),
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"a": {"dtype": "float32"}}, {"a": {"dtype": "float32"}, "dtype": "bfloat16"}),
    ],
)
def test_the_configuration_says_the_dtype_of_the_weights(tmp_path, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_config_dtype(tmp_path, torch.bfloat16)
    assert list(json.loads((tmp_path / "config.json").read_text()).items()) == list(
        expected.items()
    )
