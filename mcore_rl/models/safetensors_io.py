"""Read slices of Hugging Face checkpoints, and write checkpoints shard by shard.

Reading maps files into memory and touches only the pages of the slice asked for.

Writing follows a plan that is made before the first byte: `plan_shards` says which tensors go into
which file. One process writes it by `write_checkpoint`; several share it by `write_shards`, shard
number i going to writer i modulo their number, between a `begin_checkpoint` and a
`finish_checkpoint` of one of them. Example: shards 1 to 5 and two writers. While the tensors go by,
writer 0 keeps shard 1 and writer 1 shard 2; then both write at once; then they keep 3 and 4, write,
and writer 0 writes shard 5. So a writer holds one shard, and disks work side by side.

Files get their names when all of them are on disk, the index last: a folder that has
`model.safetensors` or the index holds a whole checkpoint, however the processes that wrote it ended
and also after a power cut.

Nothing here converts: names, shapes and dtypes are those of the files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mcore_rl.durable_files import sync
from mcore_rl.errors import CheckpointError, UserError, closest_hint, require
from mcore_rl.foreign_json import parse_json
from mcore_rl.model_code import copied_files, without_missing_code
from mcore_rl.model_files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from mcore_rl.models.mappings import ParamEntry, Range, Shape, hf_shapes, take

MAX_SHARD_BYTES = 5 * 2**30


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

    def file(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        self._slice(name)
        return self._file_of[name]

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

    def check_index(self) -> None:
        """Raise a UserError unless every file can be opened and holds the tensors that the index
        says it holds, and no others."""
        promised: dict[Path, set[str]] = {}
        for name, file in self._file_of.items():
            promised.setdefault(file, set()).add(name)
        for file, names in promised.items():
            names_in_file = set(self._open(file).keys())
            for name in sorted(names - names_in_file):
                raise UserError(f"{file} lacks {name!r}, which the index says it holds.")
            for name in sorted(names_in_file - names):
                elsewhere = self._file_of.get(name)
                place = f"places in {elsewhere.name}" if elsewhere else "does not name"
                raise UserError(f"{file} holds {name!r}, which the index {place}.")

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
            weight_map = parse_json(index.read_bytes())["weight_map"]
            file_of = {name: self.folder / _own_file(file) for name, file in weight_map.items()}
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
    """Raise a UserError unless the checkpoint holds the tensors of `entries` and no others, each in
    the file that the index says. Reads the headers of all files and no values.

    There may be besides: precomputed rotary frequencies and names that begin with
    `ModelFamily.unused_prefixes`, which transformers ignores, and `lm_head.weight`, which a critic
    does not use. A language model with tied embeddings may have it only as a copy of them; that is
    for `spec.check_weights` to see.
    """
    reader.check_index()
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


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a checkpoint that is to be written."""

    file_name: str
    names: tuple[str, ...]
    """Of its tensors, in the order in which they come."""
    num_bytes: int
    """Of its tensors."""


def plan_shards(
    tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Shard]:
    """Return the files of a checkpoint of these tensors, in their order.

    Args:
        tensors: (name, tensor), each name once. Only shapes and dtypes are read: tensors on the
            meta device will do.
        max_shard_bytes: a shard is closed before it would grow beyond this; a single larger tensor
            makes a shard of its own.
    """
    shards: list[dict[str, int]] = []
    seen: set[str] = set()
    for name, tensor in tensors:
        assert name not in seen, f"{name} is written twice"
        seen.add(name)
        if not shards or sum(shards[-1].values()) + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor.nbytes
    assert shards, "a checkpoint without tensors"
    count = len(shards)
    file_names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return [
        Shard(SINGLE_FILE if count == 1 else file_name, tuple(sizes), sum(sizes.values()))
        for file_name, sizes in zip(file_names, shards, strict=True)
    ]


def write_checkpoint(
    folder: str | Path, tensors: Iterable[tuple[str, Tensor]], shards: Sequence[Shard]
) -> None:
    """Write named tensors as one checkpoint, alone.

    Args:
        folder: made if it is not there; may hold other files, but no weights.
        tensors: as `write_shards` takes them.
        shards: their plan.

    Raises:
        CheckpointError: if a file cannot be written.
        UserError: if the folder already holds weights.
    """
    begin_checkpoint(folder)
    write_shards(folder, tensors, shards)
    finish_checkpoint(folder, shards)


def begin_checkpoint(folder: str | Path) -> None:
    """Make the folder, and remove what a writer that was killed left in it.

    Raises:
        UserError: if the folder already holds weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = sorted(file.name for file in folder.glob("*.safetensors*") if not _is_partial(file))
    require(not weights, "output folder", str(folder), f"already holds {weights[:1]}")
    for leftover in filter(_is_partial, folder.iterdir()):
        leftover.unlink()


def write_shards(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    shards: Sequence[Shard],
    writer: int = 0,
    num_writers: int = 1,
) -> None:
    """Write the shards of one writer, still under other names; see the module for the order.

    Args:
        folder: on which one writer has called `begin_checkpoint`.
        tensors: all (name, tensor) of the plan in its order, on any device. Consumed to the end
            one by one, and copied, so the source may reuse its memory. A tensor keeps its dtype.
        shards: the whole plan, the same for every writer.
        writer: number of this one, from 0.
        num_writers: how many there are.

    Raises:
        CheckpointError: if a file cannot be written.
    """
    coming = iter(tensors)
    for start in range(0, len(shards), num_writers):
        shard_tensors: dict[str, Tensor] = {}
        for number, shard in enumerate(shards[start : start + num_writers]):
            for name in shard.names:
                given, tensor = next(coming)
                assert given == name, f"{given} comes where the plan has {name}"
                if number == writer:
                    shard_tensors[name] = tensor.detach().to(
                        "cpu", copy=True, memory_format=torch.contiguous_format
                    )
        if shard_tensors:
            shard = shards[start + writer]
            num_bytes = sum(tensor.nbytes for tensor in shard_tensors.values())
            assert num_bytes == shard.num_bytes, (shard.file_name, num_bytes, shard.num_bytes)
            _write_file(_partial_file(Path(folder) / shard.file_name), shard_tensors)
    assert next(coming, None) is None, "more tensors than the plan has"


def finish_checkpoint(folder: str | Path, shards: Sequence[Shard]) -> None:
    """Give the files their names, the index last; all writers have written theirs."""
    folder = Path(folder)
    for shard in shards:
        _partial_file(folder / shard.file_name).rename(folder / shard.file_name)
    if len(shards) > 1:
        sync(folder)  # or a power cut could keep the index and lose a shard's name
        partial = _partial_file(folder / INDEX_FILE)
        partial.write_text(index_text(shards), encoding="utf-8")
        sync(partial)
        partial.rename(folder / INDEX_FILE)
    sync(folder)


def index_text(shards: Iterable[Shard]) -> str:
    """Return what the index of these shards says: the file of each tensor, and their size."""
    shards = list(shards)
    weight_map = {name: shard.file_name for shard in shards for name in shard.names}
    total_bytes = sum(shard.num_bytes for shard in shards)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    return json.dumps(index, indent=2) + "\n"


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file, on disk when this returns.

    Others may read it as any new file; that of `save_file` alone is its owner's.

    Raises:
        SafetensorError, OSError: if it cannot be written.
    """
    file.touch()
    mode = file.stat().st_mode
    save_file(dict(tensors), file, {"format": "pt"})
    file.chmod(mode)
    sync(file)


def copy_model_files(
    source: str | Path, target: str | Path, *, overwrite: bool = False
) -> list[str]:
    """Copy what goes with a model beside its weights (`copied_files`) and return the names.

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
    files = copied_files(source)
    names = [str(file.relative_to(source)) for file in files]
    for file, name in zip(files, names, strict=True):
        copy = target / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copy2(file, copy)
        if file.suffix == ".json":
            text = file.read_text(encoding="utf-8")
            cleaned = without_missing_code(file, text)
            if cleaned != text:
                copy.write_text(cleaned, encoding="utf-8")
        sync(copy)
    return names


def write_config_dtype(folder: str | Path, dtype: torch.dtype) -> None:
    """Have config.json say which dtype the weights beside it have."""
    file = Path(folder) / CONFIG_FILE
    text = config_with_dtype(file.read_text(encoding="utf-8"), dtype)
    file.write_text(text, encoding="utf-8")
    sync(file)


def config_with_dtype(text: str, dtype: torch.dtype) -> str:
    """Return a config.json that says `dtype`; the same text where it says so already.

    The key is `dtype`, or that of older versions of transformers where the file has it.
    """
    config = parse_json(text)
    keys = {"dtype", "torch_dtype"} & config.keys() or {"dtype"}
    changed = config | dict.fromkeys(keys, str(dtype).removeprefix("torch."))
    return text if changed == config else json.dumps(changed, indent=2) + "\n"


def _own_file(name: str) -> str:
    """Return the name of a file of the folder itself."""
    if Path(name).name != name:
        raise ValueError(f"{name!r} is not the name of a file in the folder")
    return name


def _write_file(file: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        write_tensors(file, tensors)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} could not be written: {error}") from error


def _partial_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.tmp")


def _is_partial(file: Path) -> bool:
    return file.match("model*.safetensors*.tmp")
