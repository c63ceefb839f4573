"""The two conversions: plan the files, write those that are not finished, give the folder its name.

    hf-to-mcore   pieces of rows of each Megatron parameter, put together from slices of Hugging
                  Face tensors                              -> `__0_*.distcp` and their metadata
    mcore-to-hf   pieces of rows of each Hugging Face tensor, cut out of Megatron's parameters
                                                            -> `model-*.safetensors` and their index

Both follow the blocks of `models/mappings.py` for one tensor-parallel rank. The plan is a function
of the input's shapes, so a conversion that goes on writes what is missing, byte for byte.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from transformers import PreTrainedConfig

from mcore_rl import __version__
from mcore_rl.checkpoint_metadata import METADATA_FILE
from mcore_rl.convert.adapters import AdaptedModel, holds_adapters
from mcore_rl.convert.ahead import made_ahead
from mcore_rl.convert.safetensors_stream import SafetensorsSource, TensorInfo, write_header
from mcore_rl.convert.staging import StagedFolder
from mcore_rl.convert.stored import StoredParam, stored_params
from mcore_rl.data.vocabulary import check_tokenizer
from mcore_rl.errors import require
from mcore_rl.model_code import copied_files, without_missing_code
from mcore_rl.model_files import CONFIG_FILE, find_model
from mcore_rl.models.mappings import Range, Shape, Vocab, rows_of
from mcore_rl.models.safetensors_io import (
    INDEX_FILE,
    CheckpointReader,
    config_with_dtype,
    index_text,
    plan_shards,
)
from mcore_rl.models.spec import check_weights, load_hf_config
from mcore_rl.observability import run_folder
from mcore_rl.torch_dist.format import (
    COMMON_FILE,
    FORMAT_FILE,
    Location,
    Piece,
    format_bytes,
    metadata_bytes,
    saved_bytes,
    saved_tensor_length,
    write_tensor,
)
from mcore_rl.torch_dist.parts import Part, append
from mcore_rl.torch_dist.source import TorchDistSource

PIECE_BYTES = 16 * 2**20
"""Largest piece that is read, rearranged and written at once, unless one row is larger."""

FILE_BYTES = 2**30
"""Size at which a file is closed; at most so much work is lost when a conversion is killed."""

OBJECTS_FILE = "__0_objects.distcp"

Progress = Callable[[int, int], None]
"""(bytes written so far, bytes in all)"""


def hf_to_mcore(
    source: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    file_bytes: int = FILE_BYTES,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write the Hugging Face folder `source` as a distributed checkpoint with its model files.

    Args:
        source: weights as safetensors, config.json.
        out: made; must not exist.
        dtype: of the weights written; None keeps each as it is.
        file_bytes: size at which a file is closed.
        progress: told after every piece.

    Raises:
        UserError: if the input is not a whole checkpoint of a known family, or `out` exists.
        OSError: if a file cannot be written; what is finished stays in `<out>.partial`.
    """
    _require_folder(source)
    config = load_hf_config(source)
    check_weights(source, config)
    check_tokenizer(source, config.vocab_size)
    hf = SafetensorsSource(CheckpointReader(source))
    params = stored_params(config)
    planned = [piece for param in params for piece in _pieces(param, hf, dtype)]
    files = {f"__0_{i}.distcp": group for i, group in enumerate(_by_file(planned, file_bytes))}
    counter = _Counter(sum(piece.nbytes for piece in planned), progress)
    staged = StagedFolder(out, _task("hf-to-mcore", [source], dtype, file_bytes))
    try:
        located: list[tuple[Piece, Location]] = []
        for name, pieces in files.items():
            if staged.has(name):
                counter.add(sum(piece.nbytes for piece in pieces))
            else:
                _write_distcp(staged, name, pieces, hf, counter)
            lengths = [saved_tensor_length(p.piece.sizes, p.piece.dtype) for p in pieces]
            offsets = accumulate(lengths, initial=0)
            for planned_piece, offset, length in zip(pieces, offsets, lengths, strict=False):
                located.append((planned_piece.piece, Location(name, offset, length)))
        nothing = saved_bytes([None])  # what Megatron's own linear layers save beside the weight
        objects = {
            param.extra_state_key: Location(OBJECTS_FILE, 0, len(nothing))
            for param in params
            if param.extra_state_key
        }
        shapes = {param.key: param.stacked_shape for param in params}
        staged.write(OBJECTS_FILE, nothing)
        staged.write(COMMON_FILE, saved_bytes({}))
        staged.write(METADATA_FILE, metadata_bytes(shapes, located, objects))
        _write_model_files(staged, Path(source), dtype)
        staged.write(FORMAT_FILE, format_bytes())
        staged.finish()
    finally:
        staged.close()
        hf.close()


def mcore_to_hf(
    source: str | Path,
    out: str | Path,
    *,
    config_from: str | Path | None = None,
    dtype: torch.dtype | None = None,
    file_bytes: int = FILE_BYTES,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write the model of a distributed checkpoint as a Hugging Face folder.

    A checkpoint of a run with LoRA gives the base with the adapters in it.

    Args:
        source: what `hf_to_mcore` wrote, or a training checkpoint `.../checkpoints/global_step_N`.
        out: made; must not exist.
        config_from: Hugging Face folder with config and tokenizer, and with the base of adapters;
            None takes `source` itself or the model of the run that the checkpoint belongs to.
        dtype: of the weights written; None keeps each as it is, of adapters as in their base.
        file_bytes: size at which a shard is closed.
        progress: told after every piece.

    Raises:
        UserError: if the input is not a whole checkpoint of that model, or `out` exists.
        OSError: if a file cannot be written; what is finished stays in `<out>.partial`.
    """
    folder, model_folder = find_checkpoint(source, config_from)
    config = load_hf_config(model_folder)
    check_tokenizer(model_folder, config.vocab_size)
    mcore = TorchDistSource(folder)
    if holds_adapters(mcore):
        tensors, parts_of = _adapted(mcore, model_folder, config, dtype)
    else:
        tensors, parts_of = _stored(mcore, config, dtype)
    shards = plan_shards(((info.name, info.on_meta()) for info in tensors.values()), file_bytes)
    counter = _Counter(sum(shard.num_bytes for shard in shards), progress)
    task = _task("mcore-to-hf", [folder, model_folder], dtype, file_bytes)
    staged = StagedFolder(out, task)
    try:
        for shard in shards:
            if staged.has(shard.file_name):
                counter.add(shard.num_bytes)
                continue
            # Wider numbers first keeps every tensor aligned to the size of its numbers.
            infos = [tensors[name] for name in shard.names]
            infos.sort(key=lambda info: -info.dtype.itemsize)
            with staged.writing(shard.file_name) as stream:
                write_header(stream, infos)
                parts = (part for info in infos for part in parts_of(info))
                for part in made_ahead(parts):
                    counter.add(append(stream, part))
        _write_model_files(staged, model_folder, next(iter(tensors.values())).dtype)
        if len(shards) > 1:
            staged.write(INDEX_FILE, index_text(shards).encode())
        staged.finish()
    finally:
        staged.close()
        mcore.close()


def adapter_to_peft(
    source: str | Path, out: str | Path, *, config_from: str | Path | None = None
) -> None:
    """Write the adapters of a training checkpoint with LoRA as a folder of PEFT.

    Args:
        source: as in `mcore_to_hf`.
        out: made; must not exist.
        config_from: as in `mcore_to_hf`.

    Raises:
        UserError: if the checkpoint holds no adapters, or `out` exists.
    """
    folder, model_folder = find_checkpoint(source, config_from)
    out = Path(out)
    require(not out.exists(), "output", str(out), "exists", "Choose another, or remove it.")
    mcore = TorchDistSource(folder)
    fix = "Leave out --adapter."
    require(holds_adapters(mcore), "--adapter", str(source), "holds no adapters", fix)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    AdaptedModel(mcore, model_folder, load_hf_config(model_folder)).write_adapter(partial)
    mcore.close()
    partial.rename(out)


PartsOf = Callable[[TensorInfo], Iterable[Part]]


def _stored(
    mcore: TorchDistSource, config: PreTrainedConfig, dtype: torch.dtype | None
) -> tuple[dict[str, TensorInfo], PartsOf]:
    """Return the tensors of a whole model by name, and what gives their parts."""
    params = stored_params(config)
    check_torch_dist(mcore, params)
    param_of = {hf.name: param for param in params for hf in param.entry.mapping.sources}
    tensors = {
        hf.name: TensorInfo(hf.name, param.dtype(mcore.dtype(param.key), dtype), hf.shape)
        for param in params
        for hf in param.entry.mapping.sources
    }
    return tensors, lambda info: _hf_parts(mcore, param_of[info.name], info)


def _adapted(
    mcore: TorchDistSource, base: Path, config: PreTrainedConfig, dtype: torch.dtype | None
) -> tuple[dict[str, TensorInfo], PartsOf]:
    """Return the tensors of a base with adapters by name, and what gives their parts."""
    model = AdaptedModel(mcore, base, config)
    biases = {
        hf.name
        for param in stored_params(config)
        if param.key.endswith(".expert_bias")
        for hf in param.entry.mapping.sources
    }
    tensors = {
        hf.name: TensorInfo(
            hf.name,
            model.dtype(hf.name) if dtype is None or hf.name in biases else dtype,
            hf.shape,
        )
        for hf in model.tensors
    }
    return tensors, lambda info: model.parts(info.name, info.dtype)


def find_checkpoint(source: str | Path, config_from: str | Path | None) -> tuple[Path, Path]:
    """Return the folder of the distributed checkpoint and the one with config and tokenizer.

    Raises:
        UserError: if either cannot be found.
    """
    source = Path(source)
    _require_folder(source)
    folder = source / "actor" if (source / "actor").is_dir() else source
    if config_from is not None:
        return folder, Path(config_from)
    if (folder / CONFIG_FILE).is_file():
        return folder, folder
    config_file = source.resolve().parent.parent / run_folder.CONFIG_FILE
    fix = "Give the Hugging Face folder by --config-from."
    require(
        config_file.is_file(),
        "input",
        str(source),
        f"has neither {CONFIG_FILE} nor a run folder's {config_file.name} two levels above",
        fix,
    )
    config = run_folder.read_config(config_file)
    written = run_folder.value_of(config, "model.path")
    try:
        model_path = OmegaConf.select(OmegaConf.create(config), "model.path")
    except OmegaConfBaseException:
        model_path = None
    key = f"{config_file}: model.path"
    found = find_model(model_path, key, weights=False) if isinstance(model_path, str) else None
    is_folder = found is not None and found.is_dir()
    # As written: what a reference to the environment stands for is nobody's business.
    require(is_folder, "model.path", written, f"of {config_file} is not a folder here", fix)
    return folder, Path(str(found))


def check_torch_dist(mcore: TorchDistSource, params: Sequence[StoredParam]) -> None:
    """Raise a UserError unless the checkpoint holds the parameters of the model and no others."""
    for param in params:
        found, wanted = mcore.shape(param.key), param.stacked_shape
        if isinstance(param.entry.mapping, Vocab):  # padded for the layout it was trained in
            found = (min(found[0], wanted[0]), *found[1:])
        require(
            found == wanted,
            f"checkpoint {mcore.folder}: shape of {param.key}",
            found,
            f"is not {wanted}, which config.json asks for",
        )
    known = {param.key for param in params}
    parts = {key.split(".")[0] for key in known}
    strange = [k for k in mcore.tensor_keys() if k.split(".")[0] in parts and k not in known]
    require(
        not strange,
        "checkpoint",
        str(mcore.folder),
        f"has {len(strange)} tensors that config.json has no place for, first {strange[:1]}",
    )


def read_param(mcore: TorchDistSource, param: StoredParam, rows: Range) -> Tensor:
    """Return rows of a parameter, [rows, ...]; do not write to it."""
    offsets, sizes = _rectangle(param, rows)
    return mcore.read(param.key, offsets, sizes).reshape(sizes[len(param.place) :])


@dataclass(frozen=True, slots=True)
class _PlannedPiece:
    """Rows of a parameter, and what they are in the checkpoint."""

    param: StoredParam
    rows: Range
    piece: Piece

    @property
    def nbytes(self) -> int:
        return torch.Size(self.piece.sizes).numel() * self.piece.dtype.itemsize


class _Counter:
    """Counts bytes and tells."""

    def __init__(self, total: int, progress: Progress) -> None:
        self.total, self._progress, self._done = total, progress, 0
        progress(0, total)

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._progress(self._done, self.total)


def _pieces(
    param: StoredParam, hf: SafetensorsSource, wanted: torch.dtype | None
) -> Iterator[_PlannedPiece]:
    stored = [hf.dtype(source.name) for source in param.entry.mapping.sources]
    dtype = param.dtype(reduce(torch.promote_types, stored), wanted)
    for rows in _ranges(param.shape[0], _rows_per_piece(param, dtype)):
        yield _PlannedPiece(param, rows, Piece(param.key, *_rectangle(param, rows), dtype))


def _write_distcp(
    staged: StagedFolder,
    name: str,
    pieces: Iterable[_PlannedPiece],
    hf: SafetensorsSource,
    counter: _Counter,
) -> None:
    with staged.writing(name) as stream:
        for planned, parts in made_ahead(
            (planned, _mcore_parts(planned, hf)) for planned in pieces
        ):
            write_tensor(stream, planned.piece.sizes, planned.piece.dtype, parts)
            counter.add(planned.nbytes)


def _mcore_parts(planned: _PlannedPiece, hf: SafetensorsSource) -> list[Part]:
    """Return the slices of Hugging Face tensors that make a piece, in order."""
    dtype = planned.piece.dtype
    return [
        hf.span(block.hf_name, block.rows)
        if hf.dtype(block.hf_name) == dtype
        else hf.read(block.hf_name, block.rows).to(dtype)
        for block in rows_of(planned.param.entry.mapping.blocks(0, 1), planned.rows)
    ]


def _hf_parts(mcore: TorchDistSource, param: StoredParam, info: TensorInfo) -> Iterator[Part]:
    """Yield the rows of a Hugging Face tensor that `param` holds, in order, piece by piece."""
    runs: list[tuple[Range, int]] = []
    top = 0
    for block in param.entry.mapping.blocks(0, 1):
        if block.hf_name == info.name:
            runs.append((block.rows, top))
        top += block.num_rows
    stored = mcore.dtype(param.key)
    step = _rows_per_piece(param, stored)
    for (start, stop), top in sorted(runs):
        for first, last in _ranges(stop - start, step):
            rows = top + first, top + last
            span = mcore.span(param.key, *_rectangle(param, rows)) if stored == info.dtype else None
            yield span or read_param(mcore, param, rows).to(info.dtype)


def _write_model_files(staged: StagedFolder, source: Path, dtype: torch.dtype | None) -> None:
    """Copy configuration and tokenizer; the configuration's dtype is made that of the weights."""
    for file in copied_files(source):
        content = file.read_bytes()
        if file.suffix == ".json":
            content = without_missing_code(file, content.decode()).encode()
        if file.name == CONFIG_FILE and dtype is not None:
            content = config_with_dtype(content.decode(), dtype).encode()
        staged.write(str(file.relative_to(source)), content)


def _by_file(pieces: Sequence[_PlannedPiece], file_bytes: int) -> Iterator[list[_PlannedPiece]]:
    """Group pieces in order; a file holds `file_bytes` at most, or one piece."""
    group: list[_PlannedPiece] = []
    num_bytes = 0
    for piece in pieces:
        if group and num_bytes + piece.nbytes > file_bytes:
            yield group
            group, num_bytes = [], 0
        group.append(piece)
        num_bytes += piece.nbytes
    yield group


def _rectangle(param: StoredParam, rows: Range) -> tuple[Shape, Shape]:
    """Return offsets and sizes of rows of a parameter in the tensor of its key."""
    (first, last), tail = rows, param.shape[1:]
    return (
        (*param.place, first, *(0 for _ in tail)),
        (*(1 for _ in param.place), last - first, *tail),
    )


def _rows_per_piece(param: StoredParam, dtype: torch.dtype) -> int:
    return max(1, PIECE_BYTES // (param.row_numel * dtype.itemsize))


def _ranges(size: int, step: int) -> Iterator[Range]:
    for first in range(0, size, step):
        yield first, min(first + step, size)


def _task(
    command: str, folders: Sequence[str | Path], dtype: torch.dtype | None, file_bytes: int
) -> dict[str, Any]:
    files = sorted(file for folder in folders for file in Path(folder).resolve().iterdir())
    stats = {str(file): file.stat() for file in files if file.is_file()}
    return {
        "command": command,
        "input": {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()},
        "dtype": str(dtype),
        "file_bytes": file_bytes,
        "versions": {"mcore_rl": __version__, "torch": torch.__version__},
    }


def _require_folder(source: str | Path) -> None:
    require(Path(source).is_dir(), "input", str(source), "is not a folder")
