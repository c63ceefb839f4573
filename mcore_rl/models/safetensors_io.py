"""Read slices of Hugging Face checkpoints, and write checkpoints shard by shard.

Reading maps files into memory and touches only the pages of the slice asked for. Writing holds one
shard in memory, writes beside the final names and renames at the end, index last: a folder that
has `model.safetensors` or the index holds a whole checkpoint, however the process that wrote it
ended (not after a power cut: nothing is flushed to disk).

Nothing here converts: names, shapes and dtypes are those of the files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mcore_rl.errors import UserError, closest_hint, require
from mcore_rl.models.mappings import ParamEntry, Range, Shape, hf_shapes, take

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Everything of a model folder that is neither weights nor code.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
)


class CheckpointReader:
    """The tensors of one checkpoint folder, read lazily.

    Args:
        folder: holds `model.safetensors`, or shards with `model.safetensors.index.json`. As in
            transformers, the single file is taken where both are there.

    Raises:
        UserError: if there are no weights, or a shard that the index names is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[Path, Any] = {}
        self._file_of = self._locate()

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._file_of)

    def shape(self, name: str) -> Shape:
        """Return the full shape of a tensor."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self.read(name, (0, 0)).dtype

    def read(self, name: str, rows: Range | None = None, cols: Range | None = None) -> Tensor:
        """Return `tensor[rows, cols]`, None meaning all, as a view on the mapped file.

        Copy it before writing to it or keeping it; it may not be contiguous.

        Raises:
            UserError: if there is no such tensor, or its file is damaged.
        """
        return take(self._slice(name), rows, cols)

    def _locate(self) -> dict[str, Path]:
        single, index = self.folder / SINGLE_FILE, self.folder / INDEX_FILE
        if single.is_file():
            return dict.fromkeys(self._open(single).keys(), single)
        require(
            index.is_file(),
            "checkpoint",
            str(self.folder),
            f"has neither {SINGLE_FILE} nor {INDEX_FILE}",
            "Give a folder with weights in the safetensors format.",
        )
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            file_of = {name: self.folder / file for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is not an index of a checkpoint: {error!r}.") from error
        missing = sorted({file.name for file in file_of.values() if not file.is_file()})
        require(
            not missing,
            "checkpoint",
            str(self.folder),
            f"lacks {len(missing)} of the shards in its index, first {missing[:1]}",
            "Download it again.",
        )
        return file_of

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is damaged or cut short: {error}.") from error
        return self._files[file]

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            hint = closest_hint(name, self._file_of)
            raise UserError(f"checkpoint {self.folder} has no tensor {name!r}.{hint}")
        file = self._file_of[name]
        try:
            return self._open(file).get_slice(name)
        except SafetensorError as error:
            raise UserError(f"{file} lacks {name!r}, which the index says it holds.") from error


def check_checkpoint(
    reader: CheckpointReader, entries: Iterable[ParamEntry], unused_prefixes: tuple[str, ...] = ()
) -> None:
    """Raise a UserError unless the checkpoint holds the tensors of `entries` and no others.

    What transformers ignores may be there too: precomputed rotary frequencies, `lm_head.weight`
    where the embeddings are tied, and names that begin with `ModelFamily.unused_prefixes`.
    """
    expected = {name: shape for entry in entries for name, shape in hf_shapes(entry).items()}
    for name, shape in expected.items():
        require(
            reader.shape(name) == shape,
            f"checkpoint {reader.folder}: shape of {name}",
            reader.shape(name),
            f"is not {shape}, which config.json asks for",
        )
    unexpected = [
        name
        for name in reader.names()
        if name not in expected
        and name != "lm_head.weight"
        and not name.endswith("rotary_emb.inv_freq")
        and not name.startswith(unused_prefixes)
    ]
    require(
        not unexpected,
        "checkpoint",
        str(reader.folder),
        f"has {len(unexpected)} tensors that config.json has no place for, first {unexpected[:1]}",
    )


def write_checkpoint(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int = 5 * 2**30,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write named tensors as one checkpoint and return their total size in bytes.

    Args:
        folder: made if it is not there; may hold other files, but no weights.
        tensors: (name, tensor) on any device, each name once. Consumed one by one, and copied, so
            the source may reuse its memory. A tensor keeps its dtype.
        max_shard_bytes: a shard is closed before it would grow beyond this; a single larger tensor
            makes a shard of its own.
        metadata: added to the header of each file.

    Raises:
        UserError: if the folder already holds weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = sorted(file.name for file in folder.glob("*.safetensors*") if not _is_partial(file))
    require(not weights, "output folder", str(folder), f"already holds {weights[:1]}")
    for leftover in filter(_is_partial, folder.iterdir()):  # of a writer that was killed
        leftover.unlink()

    names_of_shards: list[list[str]] = []
    total_bytes = 0
    header = {"format": "pt"} | dict(metadata or {})
    for shard in _shards(tensors, max_shard_bytes):
        save_file(shard, _partial_file(folder, len(names_of_shards)), header)
        names_of_shards.append(list(shard))
        total_bytes += sum(tensor.nbytes for tensor in shard.values())

    num_shards = len(names_of_shards)
    if num_shards == 1:
        _partial_file(folder, 0).rename(folder / SINGLE_FILE)
        return total_bytes
    weight_map: dict[str, str] = {}
    for i, names in enumerate(names_of_shards):
        file_name = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        _partial_file(folder, i).rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    partial_index = folder / f"{INDEX_FILE}.tmp"
    partial_index.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    partial_index.rename(folder / INDEX_FILE)
    return total_bytes


def copy_model_files(
    source: str | Path, target: str | Path, *, overwrite: bool = False
) -> list[str]:
    """Copy configuration and tokenizer files, neither weights nor code, and return their names.

    Args:
        source: model folder.
        target: made if it is not there.
        overwrite: allow a target that already holds files.

    Raises:
        UserError: if the target holds files and `overwrite` is False.
    """
    source, target = Path(source), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    require(
        overwrite or not any(target.iterdir()),
        "output folder",
        str(target),
        "is not empty",
        "Choose another, or ask to overwrite.",
    )
    files = {file for pattern in MODEL_FILES for file in source.glob(pattern) if file.is_file()}
    for file in files:
        shutil.copy2(file, target / file.name)
    return sorted(file.name for file in files)


def _shards(
    tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> Iterator[dict[str, Tensor]]:
    """Group tensors; the yielded dict is emptied when the next one is asked for."""
    shard: dict[str, Tensor] = {}
    seen: set[str] = set()
    num_bytes = 0
    for name, tensor in tensors:
        assert name not in seen, f"{name} is written twice"
        seen.add(name)
        if shard and num_bytes + tensor.nbytes > max_shard_bytes:
            yield shard
            shard.clear()
            num_bytes = 0
        shard[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        num_bytes += tensor.nbytes
    assert shard, "a checkpoint without tensors"
    yield shard


def _partial_file(folder: Path, index: int) -> Path:
    return folder / f"model-{index + 1:05d}.safetensors.tmp"


def _is_partial(file: Path) -> bool:
    return file.match("model*.safetensors*.tmp")
