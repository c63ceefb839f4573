"""What every transport must hold, as a check that the tests of one call; here and in plug-ins.

    from mcore_rl.weight_sync.check import check_transport

    def test_all_that_is_sent_arrives(tmp_path):
        check_transport("my_transport", tmp_path)

A sync must load exactly the tensors that were sent: names, types, shapes and every bit, once each.
They must not change until the engine has all of them, whether the engine frees them early or not.
This holds for one receiver and for several, and after a sync that broke off. Nothing is left
behind. Both ends are in one process here; if the transport reaches another one, updates are
serialized.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcore_rl.frames import decode, encode
from mcore_rl.weight_sync.base import (
    TRANSPORTS,
    Distance,
    Link,
    NamedTensors,
)
from mcore_rl.weight_sync.digest import Manifest
from mcore_rl.weight_sync.intake import Intake, refuse
from mcore_rl.weight_sync.sync import sync_one


class RecordingEngine:
    """An `UpdateSession` that records the tensors that it gets.

    Args:
        links: of its receivers.
        in_another_process: whether updates are serialized on their way.
        keeps: whether it keeps the tensors until the session ends, as an engine may, or frees each
            when it has a copy.
    """

    def __init__(self, links: Sequence[Link], in_another_process: bool, keeps: bool) -> None:
        self.weight_version = -1
        self.loaded: list[list[tuple[str, Tensor]]] = [[] for _ in links]
        self._in_another_process, self._keeps = in_another_process, keeps
        self._intakes = [
            Intake(link, functools.partial(self._load, loaded))
            for link, loaded in zip(links, self.loaded, strict=True)
        ]
        self._pool = ThreadPoolExecutor(len(links))
        self._coming_version = -1

    def _load(self, loaded: list[tuple[str, Tensor]], tensors: NamedTensors) -> None:
        loaded += tensors if self._keeps else _copies(tensors)

    def start_weight_update(self, version: int, with_digests: bool = False) -> None:
        self.weight_version, self._coming_version = -1, version
        for intake, loaded in zip(self._intakes, self.loaded, strict=True):
            loaded.clear()
            intake.begin(version)

    def update_weights(self, update: Any) -> None:
        if self._in_another_process:
            update = decode(encode(update))
        # The receivers may have a rendezvous.
        for receiving in [self._pool.submit(each.receive, update) for each in self._intakes]:
            receiving.result()

    def finish_weight_update(self, manifest: Manifest) -> None:
        for intake in self._intakes:
            refuse(intake.differences(manifest), self._coming_version)
        for loaded in self.loaded:
            loaded[:] = _copies(loaded)
        self._end()
        self.weight_version = self._coming_version

    def abort_weight_update(self) -> None:
        for loaded in self.loaded:
            loaded.clear()
        self._end()

    def _end(self) -> None:
        for intake in self._intakes:
            intake.end()

    def close(self) -> None:
        for intake in self._intakes:
            intake.close()
        self._pool.shutdown()


def _copies(tensors: NamedTensors) -> list[tuple[str, Tensor]]:
    return [(name, tensor.detach().clone()) for name, tensor in tensors]


class _BrokenOffError(Exception):
    """The error that breaks off a sync."""


def check_transport(name: str, run_folder: Path) -> None:
    """Raise an error that says what differs unless the registered transport holds this.

    Args:
        name: of the transport, `rollout.weight_transport`.
        run_folder: a folder of the test.

    Raises:
        WeightSyncError: if a tensor reached the engine's loader that was not sent.
        AssertionError: if a tensor changed while the engine kept it, or something was left behind.
    """
    is_remote = TRANSPORTS.get(name).reaches != {Distance.SAME_PROCESS}
    files = set(run_folder.rglob("*"))
    for num_receivers in (1, 3) if is_remote else (1,):
        for keeps in (True, False):
            _check_syncs(name, run_folder, num_receivers, keeps, is_remote)
    left = sorted(str(file) for file in set(run_folder.rglob("*")) - files)
    assert not left, f"{name} leaves behind: {', '.join(left)}"


def _check_syncs(name: str, run_folder: Path, num_receivers: int, keeps: bool, is_remote: bool):
    link = Link(
        transport=name,
        run_folder=str(run_folder),
        engine=0,
        engine_rank=0,
        num_receivers=num_receivers,
    )
    links = [replace(link, receiver=number) for number in range(num_receivers)]
    sender, engine = link.open_sender(), RecordingEngine(links, is_remote, keeps)
    for version in range(4):
        if version == 2:  # a broken sync has no effect on the next one
            with contextlib.suppress(_BrokenOffError):
                sync_one(_broken_buckets(version), sender, engine, version)
            assert engine.weight_version == -1
        sync_one(random_buckets(version), sender, engine, version)
        sent = [named for bucket in random_buckets(version) for named in bucket]
        for loaded in engine.loaded:
            _check_same(sent, loaded, f"{name}, sync {version}")
    engine.close()
    sender.close()


def _broken_buckets(version: int) -> Iterator[NamedTensors]:
    yield from itertools.islice(random_buckets(version), 2)
    raise _BrokenOffError


def random_buckets(version: int) -> Iterator[NamedTensors]:
    """Yield buckets such as an export has: several types and shapes, views of one buffer, columns,
    parameters."""
    source = torch.Generator().manual_seed(version)
    parts = torch.randn(40, generator=source).split(8)
    square = torch.randn(16, 16, generator=source)
    yield [("embed.weight", torch.nn.Parameter(torch.randn(61, 16, generator=source)))]
    for layer in range(5):
        yield [
            (f"layers.{layer}.q.weight", parts[layer].view(2, 4)),
            (f"layers.{layer}.k.weight", square[:, 3 * layer : 3 * layer + 4]),
            (f"layers.{layer}.v.weight", square.bfloat16().t()),
            (f"layers.{layer}.scale", torch.randn((), generator=source)),
            *(
                (f"layers.{layer}.experts.{expert}.weight", torch.randn(4, 4, generator=source))
                for expert in range(12 + 16 * layer)
            ),
        ]
    yield [("norm.weight", torch.randn(16, generator=source)), ("none", torch.empty(0, 16))]


def _check_same(sent: NamedTensors, loaded: NamedTensors, where: str) -> None:
    expected, found = sorted(name for name, _ in sent), sorted(name for name, _ in loaded)
    assert found == expected, f"{where}: {expected} were sent, {found} arrived"
    arrived = dict(loaded)
    for name, tensor in sent:
        other = arrived[name]
        shapes = (tensor.dtype, tensor.shape), (other.dtype, other.shape)
        assert shapes[0] == shapes[1], f"{where}: {name} was {shapes[0]}, arrived as {shapes[1]}"
        assert torch.equal(_bits(tensor), _bits(other)), f"{where}: {name} arrived changed"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
