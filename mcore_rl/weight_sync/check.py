"""What every transport must hold, as a check that the tests of one call; here and in plug-ins.

    from mcore_rl.weight_sync.check import check_transport

    def test_all_that_is_sent_arrives(tmp_path):
        check_transport("my_transport", tmp_path)

What is loaded in a sync is what was sent in it: names, types, shapes and every bit, once each, and
as it was until the engine has all of it. Nothing is left behind. Both ends are in one process here;
where the transport reaches another, an update becomes a message on its way.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
    Receiver,
)
from mcore_rl.weight_sync.sync import Target, sync_weights


class RecordingEngine:
    """An `UpdateSession` that keeps what it is given until the session ends, as an engine may."""

    def __init__(self, receiver: Receiver[Any], in_another_process: bool) -> None:
        self.weight_version = -1
        self.loaded: list[tuple[str, Tensor]] = []
        self._receiver, self._in_another_process = receiver, in_another_process
        self._kept: list[tuple[str, Tensor]] = []
        self._coming_version = -1

    def start_weight_update(self, version: int) -> None:
        self.weight_version, self._kept, self._coming_version = -1, [], version
        self._receiver.begin(version)

    def update_weights(self, update: Any) -> None:
        if self._in_another_process:
            update = decode(encode(update))
        self._receiver.receive(update, self._kept.extend)

    def finish_weight_update(self) -> None:
        self.loaded = [(name, tensor.detach().clone()) for name, tensor in self._kept]
        self._kept = []
        self._receiver.end()
        self.weight_version = self._coming_version


def check_transport(name: str, run_folder: Path) -> None:
    """Raise an AssertionError that says what differs unless the registered transport holds this.

    Args:
        name: of the transport, `rollout.weight_transport`.
        run_folder: a folder of the test.
    """
    transport = TRANSPORTS.get(name)
    files = set(run_folder.rglob("*"))
    link = Link(transport=name, run_folder=str(run_folder), engine=0, engine_rank=0)
    with ThreadPoolExecutor(1) as pool:  # the ends may have to meet
        opened = pool.submit(link.open_receiver)
        sender = link.open_sender()
        receiver = opened.result()
    engine = RecordingEngine(receiver, transport.reaches != {Distance.SAME_PROCESS})
    for version in (0, 1, 2):
        target = Target(sender, engine)
        sync_weights(random_buckets(version), [target], version)
        if target.problem is not None:
            raise target.problem
        sent = [named for bucket in random_buckets(version) for named in bucket]
        _check_same(sent, engine.loaded, f"{name}, sync {version}")
    receiver.close()
    sender.close()
    left = sorted(str(file) for file in set(run_folder.rglob("*")) - files)
    assert not left, f"{name} leaves behind: {', '.join(left)}"


def random_buckets(version: int) -> Iterator[NamedTensors]:
    """Yield buckets such as an export has: several types and shapes, views of one buffer, columns,
    parameters."""
    source = torch.Generator().manual_seed(version)
    parts = torch.randn(24, generator=source).split(8)
    square = torch.randn(16, 16, generator=source)
    yield [("embed.weight", torch.nn.Parameter(torch.randn(61, 16, generator=source)))]
    for layer in range(3):
        yield [
            (f"layers.{layer}.q.weight", parts[layer].view(2, 4)),
            (f"layers.{layer}.k.weight", square[:, 4 * layer : 4 * layer + 4]),
            (f"layers.{layer}.v.weight", square.bfloat16().t()),
            (f"layers.{layer}.scale", torch.randn((), generator=source)),
            *(
                (f"layers.{layer}.experts.{expert}.weight", torch.randn(4, 4, generator=source))
                for expert in range(12)
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
