"""Megatron's readers of a distributed checkpoint, without what they would run for the file.

Four things in such a folder are pickles. Megatron-Core 0.16.1 and torch 2.13 read

    .metadata        as it comes                       -> with a list of classes
    stored objects   as they come                      -> not at all: no object is loaded here
    common.pt        weights_only, unless TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set -> always
    stored tensors   weights_only

The second counts because a tensor that is asked for is an object if `.metadata` says so.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
    CachedMetadataFileSystemReader,
)
from megatron.core.dist_checkpointing.strategies.common import (
    COMMON_STATE_FNAME,
    TorchCommonLoadStrategy,
)
from torch.distributed.checkpoint.planner import ReadItem

from mcore_rl.checkpoint_metadata import read_metadata
from mcore_rl.errors import UserError

_ASKED_FOR = re.compile(r"GLOBAL (\S+)")


class GuardedLoad(torch_strategy.TorchDistLoadShardedStrategy):
    """Reads the tensors of a folder; its `.metadata` is read once, when this is made.

    Raises:
        UserError: as `read_metadata`.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._reader = CachedMetadataFileSystemReader(folder)
        self._reader._cached_metadata = read_metadata(folder)

    def load(self, *args: Any, **kwargs: Any) -> Any:
        with self._in_place():
            return super().load(*args, **kwargs)

    def load_tensors_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with self._in_place():
            return super().load_tensors_metadata(*args, **kwargs)

    def load_sharded_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with self._in_place():
            return super().load_sharded_metadata(*args, **kwargs)

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        """Have Megatron use this reader, and the planner below, both of which it makes itself."""
        names = {
            "_get_filesystem_reader": lambda *_, **__: self._reader,
            "MCoreLoadPlanner": _TensorsOnlyPlanner,
        }
        namespace: Any = vars(torch_strategy)
        replaced = {name: namespace[name] for name in names}
        namespace.update(names)
        try:
            yield
        finally:
            namespace.update(replaced)


class GuardedCommonLoad(TorchCommonLoadStrategy):
    """Reads what is no tensor, `common.pt`."""

    def load_common(self, checkpoint_dir: str | Path) -> Any:
        file = Path(checkpoint_dir) / COMMON_STATE_FNAME
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise refusal(file, error) from error


class _TensorsOnlyPlanner(torch_strategy.MCoreLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise UserError(f"{read_item.dest_index.fqn} is stored as an object, and not as a tensor.")


def refusal(path: Path, error: pickle.UnpicklingError) -> UserError:
    """Return one line for what torch answers with advice to read the file nevertheless."""
    asked_for = _ASKED_FOR.search(str(error))
    what = f"it asks for {asked_for[1]}" if asked_for else "it is damaged, or no file of torch.save"
    return UserError(
        f"{path} is refused, and nothing in it was run: {what}, which is no part of a checkpoint. "
        "Do not use files from this source."
    )
