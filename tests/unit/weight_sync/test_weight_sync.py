"""One weight sync through the engine's lifecycle, its two ends, and what it reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_rl.errors import RolloutError, UserError, WeightSyncError
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
from mcore_rl.weight_sync.sync import Target, sync_one, sync_weights

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

    def start_weight_update(self, version, with_digests=False):
        self.calls.append(f"start {version}")
        self._coming = version

    def update_weights(self, update):
        assert isinstance(update, Tensors)
        self.calls.append([name for name, _ in update.named_tensors])
        self.tensors |= dict(update.named_tensors)

    def finish_weight_update(self, manifest):
        self.calls.append(f"finish with {len(manifest)}")
        self.weight_version = self._coming + self._version_shift

    def abort_weight_update(self):
        self.calls.append("abort")

    def close(self):
        pass


def sync_directly(export, engine, version):
    return sync_one(export, LINK.open_sender(), engine, version)


def buckets():
    """Yield three layers, made one at a time as an exporter does."""
    yield [("embed", torch.ones(4, 2))]
    yield [("q", torch.zeros(2, 2)), ("k", torch.full((2,), 3.0, dtype=torch.bfloat16))]
    yield [("norm", torch.ones(2))]


def test_every_bucket_goes_through_one_session_in_order():
    engine = RecordingEngine()
    sync_directly(buckets(), engine, 5)
    assert engine.calls == ["start 5", ["embed"], ["q", "k"], ["norm"], "finish with 4"]
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
    assert engine.calls == ["start 5", ["embed"], "abort"]


def test_an_engine_that_fails_is_left_out_and_the_others_get_all_of_it():
    class Refusing(RecordingEngine):
        def update_weights(self, update):
            super().update_weights(update)
            if update.named_tensors[0][0] == "q":
                raise WeightSyncError("the engine is gone", role="rollout")

    targets = [Target(LINK.open_sender(), engine) for engine in (Refusing(), RecordingEngine())]
    sync_weights(buckets(), targets, 5)
    sessions: list[Any] = [target.session for target in targets]
    failed, good = sessions
    assert str(targets[0].problem) == "[role rollout] the engine is gone"
    assert failed.calls == ["start 5", ["embed"], ["q", "k"], "abort"]
    assert targets[1].problem is None
    assert good.weight_version == 5
    assert good.calls == ["start 5", ["embed"], ["q", "k"], ["norm"], "finish with 4"]


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

    def start_weight_update(self, version, with_digests=False):
        ORDER.append(f"engine starts {version}" + " with digests" * with_digests)
        self.coming = version

    def update_weights(self, update):
        ORDER.append(update)

    def finish_weight_update(self, manifest):
        ORDER.append("engine finishes")
        self.weight_version = self.coming

    def abort_weight_update(self):
        ORDER.append("engine gives up")


def test_the_sender_acts_inside_the_session_and_ends_when_the_engine_has_all():
    """So what it sent by reference or as a file is there until nobody reads it any more."""
    ORDER.clear()
    sync_one(buckets(), OrderedSender(LINK), OrderedEngine(), 5)
    assert " ".join(ORDER) == (
        "engine starts 5 sender begins 5 embed q norm engine finishes sender ends"
    )


def test_digests_are_asked_for_at_the_start():
    ORDER.clear()
    sync_one([], OrderedSender(LINK), OrderedEngine(), 5, with_digests=True)
    assert ORDER[0] == "engine starts 5 with digests"


class Breaking(OrderedSender):
    """Fails where it is told to."""

    where = ""

    def begin(self, version):
        super().begin(version)
        self.fail("begin")

    def send(self, bucket, deliver):
        super().send(bucket, deliver)
        self.fail(bucket[0][0])

    def fail(self, where):
        if where == self.where:
            raise WeightSyncError(f"broke off at {where}")


class Unwilling(OrderedEngine):
    def finish_weight_update(self, manifest):
        raise WeightSyncError("broke off at finish")


class Gone(Unwilling):
    def abort_weight_update(self):
        raise RolloutError("the engine is gone")


@pytest.mark.parametrize(
    ("where", "engine", "done"),
    [
        ("begin", OrderedEngine, ""),
        ("embed", OrderedEngine, "embed "),
        ("finish", Unwilling, "embed q norm "),
    ],
)
def test_a_sync_that_breaks_off_is_cleaned_up_at_both_ends(where, engine, done):
    ORDER.clear()
    sender = Breaking(LINK)
    sender.where = where
    with pytest.raises(WeightSyncError, match=f"broke off at {where}"):
        sync_one(buckets(), sender, engine(), 5)
    assert " ".join(ORDER) == (f"engine starts 5 sender begins 5 {done}sender ends engine gives up")


def test_an_engine_that_is_gone_does_not_hide_why_the_sync_broke_off():
    with pytest.raises(WeightSyncError, match="broke off at finish"):
        sync_one(buckets(), OrderedSender(LINK), Gone(), 5)


def test_an_unknown_transport_is_refused_with_the_configuration_by_the_closest_name():
    with pytest.raises(
        UserError,
        match=r"^rollout\.weight_transport='direkt': there is no such weight transport\. "
        r"Did you mean 'direct'\? Registered: direct, disk, gloo, ipc, nccl, shared_memory\.$",
    ):
        RolloutConfig(weight_transport="direkt")


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


class LosingABucket(Faulty):
    def send(self, bucket, deliver):
        if bucket[0][0] != "layers.0.q.weight":
            deliver(list(bucket))


class Turning(Faulty):
    def send(self, bucket, deliver):
        deliver([(name, tensor.t() if tensor.dim() == 2 else tensor) for name, tensor in bucket])


class Renaming(Faulty):
    def send(self, bucket, deliver):
        deliver([*bucket[:-1], (f"{bucket[-1][0]}.of_another", bucket[-1][1])])


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
        (Losing, Honest, r"weights 0 .*: embed\.weight did not arrive; .* and 2 more$"),
        (LosingABucket, Honest, r"layers\.0\.q\.weight did not arrive; .* and 11 more$"),
        (Doubling, Honest, r"weights 0 are not what was sent: embed\.weight arrived twice"),
        (Swapping, Honest, r"layers\.0\.experts\.10\.weight arrived with other content"),
        (Flipping, Honest, r"embed\.weight arrived with other content"),
        (Widening, Honest, r"layers\.0\.v\.weight was sent as bfloat16, arrived as float32"),
        (Turning, Honest, r"embed\.weight was sent as \[61, 16\], arrived as \[16, 61\]"),
        (Renaming, Honest, r"weights 0 .*: embed\.weight did not arrive; .* and 9 more$"),
        (Lagging, Honest, r"weights 1 are not what was sent: embed\.weight arrived with other"),
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
    with pytest.raises((AssertionError, WeightSyncError), match=fault):
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
