"""One weight sync through the engine's lifecycle, its two ends, and what it reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_rl.errors import UserError, WeightSyncError
from mcore_rl.metrics import to_floats
from mcore_rl.rollout.base import RolloutConfig
from mcore_rl.weight_sync.base import (
    TRANSPORTS,
    Distance,
    Link,
    Receiver,
    Sender,
    Transport,
)
from mcore_rl.weight_sync.check import check_transport
from mcore_rl.weight_sync.direct import Tensors
from mcore_rl.weight_sync.sync import Target, sync_weights

LINK = Link(transport="direct", run_folder="unread", engine=0, engine_rank=0)


class RecordingEngine:
    """A `RolloutEngine` that writes down its weight updates."""

    def __init__(self, version_shift=0):
        self.weight_version = -1
        self.calls = []
        self.tensors = {}
        self._version_shift = version_shift

    def generate(self, requests):
        raise AssertionError("a sync generates nothing")

    def start_weight_update(self, version):
        self.calls.append(f"start {version}")
        self._coming = version

    def update_weights(self, update):
        assert isinstance(update, Tensors)
        self.calls.append([name for name, _ in update.named_tensors])
        self.tensors |= dict(update.named_tensors)

    def finish_weight_update(self):
        self.calls.append("finish")
        self.weight_version = self._coming + self._version_shift

    def close(self):
        pass


def sync_directly(export, engine, version):
    return sync_one(export, LINK.open_sender(), engine, version)


def sync_one(export, sender, engine, version):
    target = Target(sender, engine)
    metrics = sync_weights(export, [target], version)
    if target.problem is not None:
        raise target.problem
    return metrics


def buckets():
    """Yield three layers, made one at a time as an exporter does."""
    yield [("embed", torch.ones(4, 2))]
    yield [("q", torch.zeros(2, 2)), ("k", torch.full((2,), 3.0, dtype=torch.bfloat16))]
    yield [("norm", torch.ones(2))]


def test_every_bucket_goes_through_one_session_in_order():
    engine = RecordingEngine()
    sync_directly(buckets(), engine, 5)
    assert engine.calls == ["start 5", ["embed"], ["q", "k"], ["norm"], "finish"]
    assert engine.weight_version == 5


def test_the_direct_transport_hands_tensors_over_without_a_copy():
    tensor = torch.arange(3.0)
    engine = RecordingEngine()
    sync_directly([[("w", tensor)]], engine, 0)
    assert engine.tensors["w"] is tensor


def test_a_sync_reports_bytes_and_buckets():
    metrics = sync_directly(buckets(), RecordingEngine(), 0)
    assert to_floats(metrics) == {
        "weight_sync/bytes": 4 * 8 + 4 * 4 + 2 * 2 + 4 * 2,
        "weight_sync/num_buckets": 3,
    }


def test_an_engine_that_reports_another_version_afterwards_is_refused():
    with pytest.raises(WeightSyncError, match=r"reports weights 4 after a sync of 5") as caught:
        sync_directly(buckets(), RecordingEngine(version_shift=-1), 5)
    assert caught.value.role == "rollout"


def test_a_sync_that_breaks_off_does_not_give_the_engine_its_version():
    def broken():
        yield [("embed", torch.ones(2))]
        raise WeightSyncError("a rank is gone", rank=1)

    engine = RecordingEngine()
    with pytest.raises(WeightSyncError, match="a rank is gone"):
        sync_directly(broken(), engine, 5)
    assert engine.weight_version == -1
    assert engine.calls == ["start 5", ["embed"]]


def test_an_engine_that_fails_is_left_out_and_the_others_get_all_of_it():
    class Refusing(RecordingEngine):
        def update_weights(self, update):
            super().update_weights(update)
            if update.named_tensors[0][0] == "q":
                raise WeightSyncError("the engine is gone", role="rollout")

    targets = [Target(LINK.open_sender(), engine) for engine in (Refusing(), RecordingEngine())]
    sync_weights(buckets(), targets, 5)
    failed, good = (target.session for target in targets)
    assert str(targets[0].problem) == "[role rollout] the engine is gone"
    assert failed.calls == ["start 5", ["embed"], ["q", "k"]]
    assert targets[1].problem is None
    assert good.weight_version == 5
    assert good.calls == ["start 5", ["embed"], ["q", "k"], ["norm"], "finish"]


ORDER: list[str] = []


class OrderedSender(Sender[str]):
    """Writes down what happens to it; an update is the name of a bucket's first tensor."""

    def begin(self, version):
        ORDER.append(f"sender begins {version}")

    def send(self, bucket, deliver):
        deliver(bucket[0][0])

    def end(self):
        ORDER.append("sender ends")


class OrderedEngine:
    """An `UpdateSession` that writes down what happens to it."""

    weight_version = -1

    def start_weight_update(self, version):
        ORDER.append(f"engine starts {version}")
        self.coming = version

    def update_weights(self, update):
        ORDER.append(update)

    def finish_weight_update(self):
        ORDER.append("engine finishes")
        self.weight_version = self.coming


def test_the_sender_acts_inside_the_session_and_ends_when_the_engine_has_all():
    """So what it sent by reference or as a file is there until nobody reads it any more."""
    ORDER.clear()
    sync_one(buckets(), OrderedSender(LINK), OrderedEngine(), 5)
    assert " ".join(ORDER) == (
        "engine starts 5 sender begins 5 embed q norm engine finishes sender ends"
    )


def test_an_unknown_transport_is_refused_with_the_configuration_by_the_closest_name():
    with pytest.raises(
        UserError,
        match=r"^rollout\.weight_transport='direkt': there is no such weight transport\. "
        r"Did you mean 'direct'\? Registered: direct\.$",
    ):
        RolloutConfig(weight_transport="direkt")


def test_every_transport_of_the_package_brings_what_is_sent(tmp_path):
    for name in TRANSPORTS:
        check_transport(name, tmp_path)


class Faulty(Sender[Any]):
    """Delivers a list of tensors."""

    def send(self, bucket, deliver):
        deliver(list(bucket))


class Honest(Receiver[Any]):
    def receive(self, update, load):
        load(update)


class Losing(Faulty):
    def send(self, bucket, deliver):
        deliver(bucket[:-1])


class Doubling(Faulty):
    def send(self, bucket, deliver):
        deliver([*bucket, bucket[-1]])


class Swapping(Faulty):
    """Of two experts."""

    def send(self, bucket, deliver):
        tensors = [tensor for _, tensor in bucket]
        tensors[-2:] = tensors[-2:][::-1]
        deliver([(name, tensor) for (name, _), tensor in zip(bucket, tensors, strict=True)])


class Flipping(Faulty):
    """One bit of one byte of the last tensor that has any."""

    def send(self, bucket, deliver):
        tensors = [(name, tensor.detach().clone()) for name, tensor in bucket]
        changed = [tensor for _, tensor in tensors if tensor.numel()][-1]
        changed.view(-1).view(torch.uint8)[-1] ^= 1
        deliver(tensors)


class Widening(Faulty):
    def send(self, bucket, deliver):
        deliver([(name, tensor.float()) for name, tensor in bucket])


class Lagging(Faulty):
    """Sends the first sync for ever."""

    def begin(self, version):
        self.kept = getattr(self, "kept", [])
        self.num_sent = 0

    def send(self, bucket, deliver):
        self.kept.append(list(bucket))
        deliver(self.kept[self.num_sent])
        self.num_sent += 1


class Reusing(Honest):
    """One buffer for all updates: what was loaded from it changes with the next."""

    def receive(self, update, load):
        if not hasattr(self, "buffer"):
            self.buffer = torch.empty(4096, dtype=torch.uint8)
        for name, tensor in update:
            view = self.buffer[: tensor.numel() * tensor.element_size()]
            view = view.view(tensor.dtype).view(tensor.shape)
            load([(name, view.copy_(tensor.detach()))])


class Littering(Faulty):
    def begin(self, version):
        (Path(self.link.run_folder) / f"weights_{version}").touch()


@pytest.mark.parametrize(
    ("sender", "receiver", "fault"),
    [
        (Losing, Honest, r"faulty, sync 0: .* were sent, .* arrived"),
        (Doubling, Honest, r"faulty, sync 0: .* were sent, .* arrived"),
        (Swapping, Honest, r"faulty, sync 0: layers\.0\.experts\.10\.weight arrived changed"),
        (Flipping, Honest, r"faulty, sync 0: embed\.weight arrived changed"),
        (Widening, Honest, r"layers\.0\.v\.weight was \(torch\.bfloat16, .* \(torch\.float32"),
        (Lagging, Honest, r"faulty, sync 1: embed\.weight arrived changed"),
        (Faulty, Reusing, r"faulty, sync 0: embed\.weight arrived changed"),
        (Littering, Honest, r"faulty leaves behind: .*weights_0, .*weights_1"),
    ],
)
def test_a_transport_that_brings_something_else_fails_its_check(
    sender, receiver, fault, tmp_path, monkeypatch
):
    reaches = frozenset({Distance.SAME_PROCESS})
    faulty = Transport(sender=sender, receiver=receiver, reaches=reaches)
    monkeypatch.setitem(TRANSPORTS._entries, "faulty", faulty)
    with pytest.raises(AssertionError, match=fault):
        check_transport("faulty", tmp_path)


def test_an_update_that_cannot_travel_fails_the_check_of_a_transport_between_processes(
    tmp_path, monkeypatch
):
    class Closure(Faulty):
        def send(self, bucket, deliver):
            deliver(lambda: bucket)

    far = Transport(sender=Closure, receiver=Honest, reaches=frozenset(Distance))
    monkeypatch.setitem(TRANSPORTS._entries, "far", far)
    with pytest.raises(Exception, match="pickle"):
        check_transport("far", tmp_path)
