"""Training checkpoints in Megatron's distributed format: model, optimizer, schedule.

    pending = begin_save(folder, weights, optimizer, parallel)    # copies, then writes meanwhile
    ...training goes on...
    pending.state(wait=True)                                     # this rank's file is on disk
    pending.finish()                                             # so are everyone's: seal it

Invariants:
- What is saved is what was there when `begin_save` returned, whatever happens afterwards.
- Each rank copies and writes what is its own (`shards.py`), one file, and nothing is gathered: the
  ranks of a data-parallel group write as many bytes each.
- Any layout reads what any other wrote, each rank what it needs, into the tensors that it has.
- A checkpoint that lacks something, or is of another model, is refused before anything is read:
  nothing starts fresh.
- With LoRA a checkpoint holds the adapters and not the base, of which it knows a digest.
- Of the optimizer come moments and step counters, of the schedule the number of steps; rates, decay
  and betas are the configuration's.

There are no random states in it. Training draws no random numbers, since dropout is refused, and
states kept by rank would be those of one layout; what is drawn elsewhere (order of the data, seeds
of samples) is derived from seed and step. What the controller knows is saved beside it by
`loop/checkpoints.py`, which also makes the folder appear at once.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from mcore_rl.checkpoint_metadata import METADATA_FILE
from mcore_rl.errors import CheckpointError, UserError, require
from mcore_rl.megatron.optimizer import PolicyOptimizer
from mcore_rl.megatron.parallel import Parallel
from mcore_rl.megatron.shards import OptimizerState, Shard, weights_to_read, weights_to_write
from mcore_rl.models.mappings import Shape
from mcore_rl.torch_dist.format import (
    COMMON_FILE,
    FORMAT_FILE,
    Location,
    Piece,
    format_bytes,
    metadata_bytes,
    saved_bytes,
)
from mcore_rl.torch_dist.source import TorchDistSource, read_common
from mcore_rl.types import WriteState

T = TypeVar("T")

_LONGEST_REASON = 400
"""Characters; there may be thousands of keys that do not match."""


class TrainedWeights(Protocol):
    """What the optimizer trains and a checkpoint holds."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What a run must have in common with the checkpoint that it reads, by key."""
        ...

    def sharded_state(self) -> dict[str, Any]:
        """Return Megatron's sharded tensors; their data are the parameters themselves."""
        ...


_WITHOUT_ADAPTERS = {"model.lora_rank": 0}


class WholeModel:
    """Every parameter of a model.

    Args:
        chunks: of `build_chunks`.
        parallel: process groups.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], parallel: Parallel) -> None:
        self._chunks, self._parallel = chunks, parallel

    @property
    def identity(self) -> Mapping[str, Any]:
        return _WITHOUT_ADAPTERS

    def sharded_state(self) -> dict[str, Any]:
        return {f"model{i}": self._of_chunk(chunk) for i, chunk in enumerate(self._chunks)}

    def _of_chunk(self, chunk: Any) -> dict[str, Any]:
        """Return the state without extra states: they are nothing but Transformer Engine's factors
        of FP8, and which modules have one depends on the layer specs."""
        state = chunk.sharded_state_dict(metadata=_metadata(self._parallel))
        left_out = chunk.state_dict().keys() - state.keys()
        assert all(map(_is_extra_state, left_out)), left_out
        return {name: value for name, value in state.items() if not _is_extra_state(name)}


def _is_extra_state(name: str) -> bool:
    return name.endswith("_extra_state")


_Copy = tuple[Piece, torch.Tensor]
_Written = list[tuple[Piece, Location]]


class PendingSave:
    """A checkpoint whose file this rank writes in the background, from copies.

    A thread writes it and not a process, as Megatron would have it: an orphan of a killed rank
    would go on writing into the folder of the run that the user has begun to resume.

    Args:
        folder: of the checkpoint.
        shards: what this rank writes.
        common: what the checkpoint has beside tensors.
        parallel: process groups.
    """

    def __init__(
        self,
        folder: Path,
        shards: Iterable[Shard],
        common: Mapping[str, Any],
        parallel: Parallel,
    ) -> None:
        self._folder, self._parallel = folder, parallel
        self._common = saved_bytes(dict(common))
        self._shapes: dict[str, Shape] = {}
        copies: list[_Copy] = []
        for shard in shards:
            self._shapes[shard.key] = shard.shape
            numbers = shard.numbers.to("cpu", copy=True)
            piece = Piece(shard.key, shard.offsets, tuple(numbers.shape), numbers.dtype)
            copies.append((piece, numbers))
        copies.reverse()  # taken from the end
        writer = ThreadPoolExecutor(1, "checkpoint")
        # As torch names the files of a rank.
        file = folder / f"__{parallel.rank}_0.distcp"
        self._writing: Future[_Written] = writer.submit(_write, file, copies)
        writer.shutdown(wait=False)

    def state(self, *, wait: bool) -> WriteState:
        """Return how far this rank is, at once or, with `wait`, when it has written or failed."""
        if not wait and not self._writing.done():
            return WriteState(is_done=False)
        error = self._writing.exception()
        problem = _cannot_be(self._folder, "written", error) if error else ""
        return WriteState(is_done=True, problem=problem)

    def finish(self) -> None:
        """Write what makes the files a checkpoint; collective, when all ranks have written.

        Raises:
            CheckpointError: if that cannot be written.
        """
        is_first = self._parallel.rank == 0
        by_rank: Any = [None] * dist.get_world_size() if is_first else None
        own = self._shapes, self._writing.result()
        dist.gather_object(own, by_rank, group=self._parallel.host)
        _together(self._folder, "written", self._parallel, lambda: self._seal(by_rank or []))

    def _seal(self, by_rank: Sequence[tuple[dict[str, Shape], _Written]]) -> None:
        if not by_rank:
            return
        shapes = {key: shape for of_rank, _ in by_rank for key, shape in of_rank.items()}
        located = [one for _, of_rank in by_rank for one in of_rank]
        _check_cover(shapes, [piece for piece, _ in located])
        (self._folder / COMMON_FILE).write_bytes(self._common)
        (self._folder / METADATA_FILE).write_bytes(metadata_bytes(shapes, located, {}))
        (self._folder / FORMAT_FILE).write_bytes(format_bytes())


def _write(file: Path, copies: list[_Copy]) -> _Written:
    """Write copies one after the other, sync the file to disk and return what is where."""
    written: _Written = []
    if not copies:  # nothing that another rank does not write
        return written
    with file.open("wb") as stream:
        while copies:
            piece, numbers = copies.pop()
            start = stream.tell()
            torch.save(numbers, stream)
            written.append((piece, Location(file.name, start, stream.tell() - start)))
        stream.flush()
        os.fsync(stream.fileno())
    return written


def _check_cover(shapes: Mapping[str, Shape], pieces: Sequence[Piece]) -> None:
    """Raise a ValueError unless there are as many numbers of each tensor as it has, and no two
    rectangles at one place."""
    counts, places = dict.fromkeys(shapes, 0), set()
    for piece in pieces:
        counts[piece.key] += math.prod(piece.sizes)
        places.add((piece.key, piece.offsets))
    for key, count in counts.items():
        if count != math.prod(shapes[key]) or len(places) != len(pieces):
            raise ValueError(f"{count} numbers are written of {key}, which is {shapes[key]}")


def begin_save(
    folder: Path,
    weights: TrainedWeights,
    optimizer: PolicyOptimizer,
    parallel: Parallel,
) -> PendingSave:
    """Copy everything that training needs to go on and begin to write it; on all ranks.

    Args:
        folder: exists, is empty and is seen by every rank.
        weights: that the optimizer trains.
        optimizer: theirs.
        parallel: process groups.
    """
    shards, common = _to_save(weights, optimizer, parallel)
    return PendingSave(folder, shards, common, parallel)


def _to_save(
    weights: TrainedWeights, optimizer: PolicyOptimizer, parallel: Parallel
) -> tuple[Iterator[Shard], dict[str, Any]]:
    """Return what this rank writes and what the checkpoint has beside tensors."""
    state = weights.sharded_state()
    of_optimizer = _state_of(optimizer, state, parallel)
    common = {
        "identity": {**weights.identity, **optimizer.identity},
        "schedule": {"num_steps": optimizer.schedule.num_steps},
        "optimizer": of_optimizer.common,
    }
    shards = itertools.chain(weights_to_write(state, parallel), of_optimizer.to_write(parallel))
    return shards, common


def _state_of(
    optimizer: PolicyOptimizer, weights: Mapping[str, Any], parallel: Parallel
) -> OptimizerState:
    for one in optimizer.inner.chained_optimizers:
        # Adam makes its moments in its first update; a run may have skipped all so far.
        one.init_state_fn(one.optimizer, one.config)
    return OptimizerState(optimizer.inner, weights, _metadata(parallel))


def load_checkpoint(
    folder: Path,
    weights: TrainedWeights,
    optimizer: PolicyOptimizer,
    parallel: Parallel,
) -> None:
    """Read back what was saved; collective, whatever layout wrote it.

    Raises:
        CheckpointError: if it cannot be read, lacks something that this model and optimizer have,
            or has something that they lack.
        UserError: if it is of other adapters, of another base, with adapters where there are none,
            or of an optimizer of another kind; or if a file of it would have code run.
    """
    identity = {**weights.identity, **optimizer.identity}
    state = weights.sharded_state()
    of_optimizer = _state_of(optimizer, state, parallel)
    shards = [*weights_to_read(state), *of_optimizer.to_read()]

    def prepare() -> tuple[TorchDistSource, Any, int]:
        common = read_common(folder)
        # Checkpoints from before an option was written down have the value of the run, or cannot
        # be read.
        saved = {**optimizer.identity, **common.get("identity", _WITHOUT_ADAPTERS)}
        for key, value in identity.items():
            rule = f"is not what the checkpoint {folder} was saved with, {saved.get(key)!r}"
            require(
                saved.get(key) == value, key, value, rule, "Use the same, or another run folder."
            )
        return _source(folder, shards), _step(common["optimizer"]), common["schedule"]["num_steps"]

    source, step, num_steps = _together(folder, "read", parallel, prepare)
    _refuse_others(source, shards, parallel)
    _together(folder, "read", parallel, lambda: _fill(source, shards))
    with torch.no_grad():  # float32 parameters are views into leaves
        of_optimizer.was_read()
    _set_step(optimizer.inner, step)
    optimizer.schedule.num_steps = 0
    optimizer.schedule.step(increment=num_steps)


def load_model(folder: Path, chunks: Sequence[torch.nn.Module], parallel: Parallel) -> None:
    """Fill chunks that are not wrapped for training from a distributed checkpoint; collective.

    Args:
        folder: what `begin_save` or `mcore-rl convert hf-to-mcore` wrote; of its content only
            the weights are read.
        chunks: of `build_chunks`, in any layout.
        parallel: process groups.

    Raises:
        CheckpointError, UserError: as `load_checkpoint`.
    """
    shards = [*weights_to_read(WholeModel(chunks, parallel).sharded_state())]
    _together(folder, "read", parallel, lambda: _fill(_source(folder, shards), shards))


def _source(folder: Path, shards: Sequence[Shard]) -> TorchDistSource:
    """Return the checkpoint, which has all shards."""
    source = TorchDistSource(folder)
    wanted, known = {shard.key: shard for shard in shards}, set(source.tensor_keys())
    for key in sorted(wanted.keys() & set(source.object_keys())):
        raise UserError(f"{key} is stored as an object, and not as a tensor.")
    if missing := sorted(wanted.keys() - known):
        raise CheckpointError(_short(f"{folder} cannot be read: it has no {', '.join(missing)}"))
    for key, shard in wanted.items():
        if source.shape(key) != shard.shape and not shard.shape_may_differ:
            raise CheckpointError(
                f"{folder} cannot be read: {key} is {source.shape(key)} there and {shard.shape} in "
                "this model"
            )
    return source


def _refuse_others(source: TorchDistSource, shards: Sequence[Shard], parallel: Parallel) -> None:
    """Raise a CheckpointError if there are tensors that no rank has; collective."""
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, {shard.key for shard in shards}, group=parallel.host)
    if others := sorted(set(source.tensor_keys()).difference(*by_rank)):
        raise CheckpointError(
            _short(
                f"{source.folder} cannot be read: it has tensors that this model and its optimizer "
                f"lack: {', '.join(others)}"
            )
        )


def _fill(source: TorchDistSource, shards: Iterable[Shard]) -> None:
    for shard in shards:
        source.read_into(shard.key, shard.offsets, shard.numbers)
    source.close()


def _step(state: Any) -> Any:
    """Return how many updates an optimizer had done, None before the first, as Megatron keeps it:
    in groups of parameters, or once for all."""
    found = set(_steps(state))
    if len(found) > 1:
        raise ValueError(f"its optimizers have done {sorted(found)} updates")
    return next(iter(found), None)


def _steps(state: Any) -> Iterator[Any]:
    if isinstance(state, Mapping):
        for key, value in state.items():
            if key in ("step", "common_step"):
                yield from () if value is None else (int(value),)
            else:
                yield from _steps(value)
    elif isinstance(state, list):
        for value in state:
            yield from _steps(value)


def _set_step(inner: Any, step: int | None) -> None:
    for group in inner.param_groups:
        group.pop("step", None)
        if step is not None:
            group["step"] = step
    for one in inner.chained_optimizers:
        for state in one.optimizer.state.values():
            if "step" in state:  # torch's own Adam counts by tensor
                state["step"].fill_(step or 0)


def _metadata(parallel: Parallel) -> dict[str, Any]:
    """Return what says how Megatron names and cuts what it saves."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel.dp_cp,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def _together(folder: Path, verb: str, parallel: Parallel, work: Callable[[], T]) -> T:
    """Return what `work` returns; what it raises on one rank is raised on all; collective.

    Raises:
        CheckpointError: of anything but what is the user's mistake.
    """
    result: Any = None
    problem: Exception | None = None
    try:
        result = work()
    except (CheckpointError, UserError) as error:
        problem = error
    except Exception as error:  # noqa: BLE001  whatever it is, the others are told
        problem = CheckpointError(_cannot_be(folder, verb, error))
        problem.__cause__ = error
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem, group=parallel.host)
    for found in filter(None, (problem, *problems)):
        raise found
    return result


def _cannot_be(folder: Path, verb: str, error: BaseException) -> str:
    """Return one line about the failure."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__  # torch.save covers it by an error of its own
    reason = " ".join(str(cause or error).split())
    return _short(f"{folder} cannot be {verb}: {type(cause or error).__name__}: {reason}")


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
