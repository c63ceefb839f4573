"""`.metadata` of a folder in torch.distributed.checkpoint's format, read without running it.

The file is a pickle, and a pickle can call any function by its name. torch and Megatron read it
without a check. Checkpoints may come from strangers, so here only the classes are admitted that
torch and Megatron put into such a file; any other name is refused before it is called.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path, PosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import _get_layout

from mcore_rl.errors import UserError

METADATA_FILE = ".metadata"

_CLASSES = {
    metadata: (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    # Megatron keeps beside it which rank wrote what.
    planner: ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    filesystem: ("_StorageInfo", "_StoragePrefix"),
}
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_ADMITTED: Mapping[tuple[str, str], Any] = {
    **{(of.__name__, name): getattr(of, name) for of, names in _CLASSES.items() for name in names},
    **{("torch", name): kind for name, kind in vars(torch).items() if type(kind) is torch.dtype},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): PosixPath,
    ("pathlib._local", "PosixPath"): PosixPath,  # its name in Python 3.13
    # Subclasses of Megatron-Core 0.15, which 0.16 has as empty classes of these names.
    (_MEGATRON, "MCoreMetadata"): Metadata,
    (_MEGATRON, "MCoreSavePlan"): planner.SavePlan,
}
_DAMAGE = (
    *(EOFError, AttributeError, ImportError, IndexError, KeyError, MemoryError),
    *(OverflowError, RecursionError, TypeError, ValueError, pickle.UnpicklingError),
)
"""What reading a pickle with wrong bytes in it raises."""


def read_metadata(folder: Path) -> Metadata:
    """Return the content of a checkpoint's `.metadata`.

    Raises:
        UserError: if it is damaged, asks for a class that does not belong there, or names a file
            that is not in the folder.
    """
    file = folder / METADATA_FILE
    try:
        with file.open("rb") as stream:
            found = _MetadataUnpickler(stream).load()
        _check(found)
    except _NotAdmitted as error:
        raise refusal(file, f"it asks for {error}") from error
    except _DAMAGE as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is damaged: {type(error).__name__}: {reason}.") from error
    if getattr(found, "storage_meta", None) is None:
        found.storage_meta = StorageMeta()
    return found


def refusal(file: Path, what: str) -> UserError:
    """Return one line about a pickle that was not followed.

    Args:
        file: with the pickle.
        what: the finding: "it asks for posix.system".
    """
    return UserError(
        f"{file} is refused, and nothing in it was run: {what}, which is no part of a checkpoint. "
        "Do not use files from this source."
    )


class _NotAdmitted(pickle.UnpicklingError):
    pass


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise _NotAdmitted(f"{module}.{name}") from None


def _check(found: Any) -> None:
    """Raise a ValueError unless the parts that readers use have the expected types."""
    if type(found) is not Metadata:
        raise ValueError("it is not the metadata of a checkpoint")
    for key, kind in found.state_dict_metadata.items():
        if not isinstance(key, str) or not (type(kind) is BytesStorageMetadata or _is_tensor(kind)):
            raise ValueError(f"{key!r} is neither a tensor nor an object")
    for index, info in found.storage_data.items():
        if type(index) is not MetadataIndex or type(info) is not _StorageInfo:
            raise ValueError(f"{index!r} has no place in a file")
        name = info.relative_path
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise ValueError(f"it names {name!r}, which is no file of the folder")
        if info.offset < 0 or info.length < 0:
            raise ValueError(f"it places {index.fqn!r} before the beginning of a file")


def _is_tensor(found: Any) -> bool:
    return (
        type(found) is TensorStorageMetadata
        and type(found.properties) is TensorProperties
        and isinstance(found.size, torch.Size)
        and all(
            type(chunk) is ChunkStorageMetadata
            and isinstance(chunk.offsets, torch.Size)
            and isinstance(chunk.sizes, torch.Size)
            and len(found.size) == len(chunk.offsets) == len(chunk.sizes)
            for chunk in found.chunks
        )
    )
