"""Training checkpoints in Megatron's distributed format: model, optimizer, schedule.

    pending = begin_save(folder, weights, optimizer, parallel)    # copies, then writes meanwhile
    ...training goes on...
    pending.state(wait=True)                                     # this rank's files are on disk
    pending.finish()                                             # so are everyone's: seal it

Invariants:
- What is saved is what was there when `begin_save` returned, whatever happens afterwards.
- Any layout reads what any other wrote ("fully_reshardable").
- A checkpoint that lacks something, or is of another model, is refused: nothing starts fresh.
- With LoRA a checkpoint holds the adapters and not the base, of which it knows a digest.
- Of the optimizer come moments and step counters, of the schedule the number of steps; rates, decay
  and betas are the configuration's.

There are no random states in it. Training draws no random numbers, since dropout is refused, and
states kept by rank would be those of one layout; what is drawn elsewhere (order of the data, seeds
of samples) is derived from seed and step. What the controller knows is saved beside it by
`loop/checkpoints.py`, which also makes the folder appear at once.
"""

from __future__ import annotations

import contextlib
import pickle
import queue
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from mcore_rl.errors import CheckpointError, UserError, require
from mcore_rl.megatron.guarded_load import GuardedCommonLoad, GuardedLoad, refusal
from mcore_rl.megatron.optimizer import PolicyOptimizer
from mcore_rl.megatron.parallel import Parallel
from mcore_rl.types import WriteState

_LONGEST_REASON = 400
"""Characters; Megatron lists every key that does not match."""


class TrainedWeights(Protocol):
    """What the optimizer trains and a checkpoint holds."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What a run must have in common with the checkpoint that it reads, by key."""
        ...

    def sharded_state(self) -> dict[str, Any]:
        """Return Megatron's sharded tensors; their data are the parameters themselves."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over the values of a `sharded_state` that was read."""
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
        return {name: value for name, value in state.items() if not _is_extra_state(name)}

    def load(self, state: Mapping[str, Any]) -> None:
        for index, chunk in enumerate(self._chunks):
            missing, unexpected = chunk.load_state_dict(state[f"model{index}"], strict=False)
            assert not unexpected and all(map(_is_extra_state, missing)), (missing, unexpected)


class PendingSave:
    """A checkpoint whose files this rank writes in the background, from copies.

    A thread writes them and not a process, as Megatron would have it: an orphan of a killed rank
    would go on writing into the folder of the run that the user has begun to resume.

    Args:
        folder: of the checkpoint.
        request: Megatron's plan of it.
    """

    def __init__(self, folder: Path, request: Any) -> None:
        self._folder, self._request = folder, request
        writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] = writer.submit(_write, request, _copied_buckets(request))
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
        with _as_checkpoint_error(self._folder, "written"):
            for finalize in self._request.finalize_fns:
                finalize()


def begin_save(
    folder: Path,
    weights: TrainedWeights,
    optimizer: PolicyOptimizer,
    parallel: Parallel,
) -> PendingSave:
    """Copy everything that training needs to go on and begin to write it; collective.

    Args:
        folder: exists, is empty and is seen by every rank.
        weights: that the optimizer trains.
        optimizer: theirs.
        parallel: process groups.

    Raises:
        CheckpointError: if the part that is written at once cannot be.
    """
    return _begin_write(folder, _state_to_save(weights, optimizer, parallel))


def _state_to_save(
    weights: TrainedWeights, optimizer: PolicyOptimizer, parallel: Parallel
) -> dict[str, Any]:
    for one in _parts(optimizer.inner):
        # Adam makes its moments in its first update; a run may have skipped all so far.
        one.init_state_fn(one.optimizer, one.config)
    state = _sharded_state(weights, optimizer, parallel, is_loading=False)
    state["identity"] = {**weights.identity, **optimizer.identity}
    state["schedule"] = {"num_steps": optimizer.schedule.num_steps}
    return state


def _begin_write(folder: Path, state: dict[str, Any]) -> PendingSave:
    # Read by this process alone, so it needs no server process (filesystem_async.py:51), which
    # would take seconds to start and outlive a rank that is killed.
    filesystem_async._results_queue = queue.SimpleQueue()
    strategy = get_default_save_sharded_strategy("torch_dist")
    with _as_checkpoint_error(folder, "written"):
        request = dist_checkpointing.save(state, str(folder), strategy, async_sharded_save=True)
    return PendingSave(folder, request)


def _copied_buckets(request: Any) -> list[Any]:
    """Return what this rank writes, file by file, with copies of the tensors in host memory."""
    if request.async_fn is None:  # nothing that another rank does not write
        return []
    _, buckets, _ = request.async_fn_args
    return [
        (path, key, (objects, [(item, tensor.to("cpu", copy=True)) for item, tensor in tensors]))
        for path, key, (objects, tensors) in buckets
    ]


def _write(request: Any, buckets: list[Any]) -> None:
    """Write the files and sync them to disk; does what
    FileSystemWriterAsync.write_preloaded_data_multiproc does with processes that it forks."""
    if not buckets:
        return
    transforms, _ = request.async_fn.args
    _, _, results = request.async_fn_args
    written = {}
    for number, bucket in enumerate(buckets):
        answers: Any = queue.SimpleQueue()  # declared as those between processes
        unfinished: Any = queue.Queue()
        unfinished.put(number)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, answers, unfinished, use_fsync=True
        )
        _, written[number] = answers.get()
        if isinstance(written[number], Exception):
            raise written[number]
    results.put(written)


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
    with _as_checkpoint_error(folder, "read"):
        common: Any = GuardedCommonLoad().load_common(folder)
    # Checkpoints from before an option was written down have the value of the run, or cannot be
    # read.
    saved = {**optimizer.identity, **common.get("identity", _WITHOUT_ADAPTERS)}
    for key, value in {**weights.identity, **optimizer.identity}.items():
        rule = f"is not what the checkpoint {folder} was saved with, {saved.get(key)!r}"
        require(saved.get(key) == value, key, value, rule, "Use the same, or another run folder.")
    wanted = _sharded_state(weights, optimizer, parallel, is_loading=True)
    settings = [_settings(group) for group in optimizer.inner.param_groups]
    with _as_checkpoint_error(folder, "read"):
        state: Any = dist_checkpointing.load(
            wanted,
            str(folder),
            GuardedLoad(folder),
            GuardedCommonLoad(),
            strict=StrictHandling.RAISE_ALL,
        )
        weights.load(state)
        with torch.no_grad():  # float32 parameters are views into leaves
            optimizer.inner.load_state_dict(state["optimizer"])
        num_steps = state["schedule"]["num_steps"]
    for group, own in zip(optimizer.inner.param_groups, settings, strict=True):
        group.update(own)
    optimizer.schedule.num_steps = 0
    optimizer.schedule.step(increment=num_steps)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Return what a group of parameters has from the configuration."""
    return {key: value for key, value in group.items() if key not in ("params", "step")}


@contextlib.contextmanager
def _as_checkpoint_error(folder: Path, verb: str) -> Iterator[None]:
    try:
        yield
    # CheckpointException is no Exception.
    except (Exception, CheckpointException) as error:
        reason = _reason(error)
        if isinstance(reason, UserError):
            raise reason from None
        if isinstance(reason, pickle.UnpicklingError):
            raise refusal(folder, reason) from error
        raise CheckpointError(_cannot_be(folder, verb, error)) from error


def _cannot_be(folder: Path, verb: str, error: BaseException) -> str:
    """Return one line about the failure, without the tracebacks that torch makes part of it."""
    error = _reason(error)
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__  # torch.save covers it by an error of its own
    reason = " ".join(str(cause or error).split())
    if len(reason) > _LONGEST_REASON:
        reason = f"{reason[:_LONGEST_REASON]}..."
    name = "" if isinstance(error, CheckpointingException) else f"{type(cause or error).__name__}: "
    return f"{folder} cannot be {verb}: {name}{reason}"


def _reason(error: BaseException) -> BaseException:
    """Return what a rank raised, where torch tells of it by an error of its own."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()), (error,))[0]
    return error


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
    model = WholeModel(chunks, parallel)
    with _as_checkpoint_error(folder, "read"):
        state: Any = dist_checkpointing.load(
            model.sharded_state(), str(folder), GuardedLoad(folder), GuardedCommonLoad()
        )
    model.load(state)


def _is_extra_state(name: str) -> bool:
    return name.endswith("_extra_state")


def _sharded_state(
    weights: TrainedWeights,
    optimizer: PolicyOptimizer,
    parallel: Parallel,
    is_loading: bool,
) -> dict[str, Any]:
    state = weights.sharded_state()
    with _padding_kept(optimizer.inner):
        state["optimizer"] = optimizer.inner.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=_metadata(parallel)
        )
    return state


def _metadata(parallel: Parallel) -> dict[str, Any]:
    """Return what says how Megatron names and cuts what it saves."""
    return {
        # The default of 0.16.1 is a type that it can no longer load (distrib_optimizer.py:1226).
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel.dp_cp,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def _parts(optimizer: Any) -> list[Any]:
    """Return Megatron's optimizers, of which a chain has one for experts apart."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


@contextlib.contextmanager
def _padding_kept(optimizer: Any) -> Iterator[None]:
    """Have the state of a distributed optimizer gathered with the padding between its buckets.

    Megatron gathers it without (distrib_optimizer.py:1027) and then cuts each parameter out at its
    place with it (:1500), so after a padded bucket every parameter would be saved with a
    neighbour's numbers and the last ones with zeros. There is more than one bucket with tied
    embeddings on two stages, and with `overlap_grad_reduce` in a large model.
    """
    parts = [
        (part, numel)
        for one in _parts(optimizer)
        for buffer in getattr(one, "buffers", [])
        for part, numel in (
            (buffer, buffer.numel),
            *((bucket, bucket.grad_data.numel()) for bucket in buffer.buckets),
        )
    ]
    unpadded = [part.numel_unpadded for part, _ in parts]
    for part, numel in parts:
        part.numel_unpadded = numel
    try:
        yield
    finally:
        for (part, _), numel in zip(parts, unpadded, strict=True):
            part.numel_unpadded = numel
