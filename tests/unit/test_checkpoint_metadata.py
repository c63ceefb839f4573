"""`.metadata` is read as torch reads it, and nothing that it says is run."""

import builtins
import contextlib
import pickle
from pathlib import PosixPath
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save

from mcore_rl.checkpoint_metadata import METADATA_FILE, read_metadata
from mcore_rl.errors import UserError
from tests import poison

WRONG: Any = (1, 2, 3)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.float8_e4m3fn]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a folder that torch wrote: tensors of several dtypes, and objects."""
    folder = tmp_path_factory.mktemp("saved")
    state = {str(dtype): torch.zeros(2, 3, dtype=dtype) for dtype in DTYPES}
    save({**state, "object": {"list": [1, 2]}, "text": "x"}, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture
def holding(tmp_path):
    """Return a function: what `.metadata` holds, in bytes or to be pickled -> its folder."""

    def folder_with(content):
        data = content if isinstance(content, bytes) else pickle.dumps(content)
        (tmp_path / METADATA_FILE).write_bytes(data)
        return tmp_path

    return folder_with


def described(tensors, places):
    """Return the metadata of a checkpoint, whatever it holds."""
    return Metadata(tensors, storage_data=places)


def tensor(**changes):
    """Return the metadata of one tensor; `changes` are of what its storage says."""
    where = {"relative_path": "0.distcp", "offset": 0, "length": 9} | changes
    size = torch.Size([2])
    chunk = ChunkStorageMetadata(torch.Size([0]), size)
    kinds: dict[str, Any] = {"key": TensorStorageMetadata(TensorProperties(), size, [chunk])}
    index = MetadataIndex("key", chunk.offsets)
    return Metadata(kinds, storage_data={index: _StorageInfo(**where)})


def test_what_torch_saves_is_read_as_torch_reads_it(saved):
    expected = FileSystemReader(saved).read_metadata()
    found: Any = read_metadata(saved)
    assert found.state_dict_metadata == expected.state_dict_metadata
    assert found.storage_data == expected.storage_data
    assert found.planner_data == expected.planner_data
    tensors = [kind for kind in found.state_dict_metadata.values() if vars(kind)]
    assert {kind.properties.dtype for kind in tensors} == set(DTYPES)
    assert found.storage_meta.checkpoint_id == PosixPath(saved)


def test_a_call_in_front_of_a_good_file_is_refused_and_not_made(saved, holding, tmp_path):
    called = tmp_path / "called"
    good = (saved / METADATA_FILE).read_bytes()
    content = poison.in_front_of(good, called)
    pickle.loads(content)
    assert called.exists()  # a plain reader does make it, and goes on
    called.rmdir()
    with pytest.raises(UserError) as caught:
        read_metadata(holding(content))
    assert not called.exists()
    assert str(caught.value) == (
        f"{tmp_path}/.metadata is refused, and nothing in it was run: it asks for posix.mkdir, "
        "which is no part of a checkpoint. Do not use files from this source."
    )


@pytest.mark.parametrize(
    "name",
    [
        "os system",
        "posix system",
        "builtins eval",
        "builtins getattr",
        "subprocess Popen",
        "torch load",
        "torch.serialization load",
        "torch.serialization os.system",
        "torch.distributed.checkpoint.metadata os.getcwd",
        "torch.distributed.checkpoint.metadata Metadata.__init__",
        "pathlib PosixPath.touch",
        "functools partial",
    ],
)
@pytest.mark.parametrize("protocol", [0, 4])
def test_any_other_name_is_refused(holding, name, protocol):
    module, _, attribute = name.partition(" ")
    if protocol == 0:
        content = f"c{module}\n{attribute}\n.".encode()
    else:
        texts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in name.split())
        content = b"\x80\x04" + texts + b"\x93."
    with pytest.raises(UserError, match=f"asks for {module}.{attribute}, which is no part"):
        read_metadata(holding(content))


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"state_dict_metadata": {}}, "not the metadata of a checkpoint"),
        (described({"key": 5}, {}), "'key' is neither a tensor nor an object"),
        (described({"key": TensorStorageMetadata(*WRONG)}, {}), "is neither"),
        (described({}, {"key": 5}), "'key' has no place in a file"),
        (described({}, None), "AttributeError"),
        (tensor(relative_path="../other/0.distcp"), "'../other/0.distcp', which is no file of"),
        (tensor(relative_path="/etc/passwd"), "'/etc/passwd', which is no file of the folder"),
        (tensor(relative_path=""), "'', which is no file"),
        (tensor(offset=-5), "before the beginning"),
        (tensor(length=-5), "before the beginning"),
        (tensor(offset="5"), "TypeError"),
    ],
)
def test_what_is_not_the_description_of_a_folder_is_one_line(holding, found, reason):
    with pytest.raises(UserError, match=r"\.metadata is damaged: ") as caught:
        read_metadata(holding(found))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_good_description_passes(holding):
    assert [info.length for info in read_metadata(holding(tensor())).storage_data.values()] == [9]


def test_objects_beside_tensors_pass(holding):
    found = Metadata({"key": BytesStorageMetadata()}, storage_data={})
    assert read_metadata(holding(found)).state_dict_metadata == found.state_dict_metadata


@given(data=st.data())
def test_wrong_bytes_are_a_user_s_error_or_read(tmp_path_factory, saved, data):
    """Cut anywhere, or with a byte changed anywhere: never another exception."""
    content = bytearray((saved / METADATA_FILE).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[at:]
    else:
        content[at] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("wrong")
    (folder / METADATA_FILE).write_bytes(bytes(content))
    with contextlib.suppress(UserError):
        read_metadata(folder)


def test_builtins_are_not_admitted(holding):
    """No name of the language itself is: what is on the list is written there."""
    for name in dir(builtins):
        with pytest.raises(UserError, match="is no part of a checkpoint"):
            read_metadata(holding(f"cbuiltins\n{name}\n.".encode()))
