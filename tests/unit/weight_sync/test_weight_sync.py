"""One weight sync through the engine's lifecycle, and what it reports."""

from __future__ import annotations

import pytest
import torch

from mcore_rl.errors import UserError, WeightSyncError
from mcore_rl.metrics import to_floats
from mcore_rl.weight_sync.base import TRANSPORTS
from mcore_rl.weight_sync.sync import sync_weights


class RecordingEngine:
    """A `RolloutEngine` that writes down its weight updates."""

    def __init__(self, version_shift=0):
        self.weight_version = -1
        self.calls = []
        self.tensors = {}
        self._version_shift = version_shift

    def generate(self, requests):
        raise AssertionError("a sync generates nothing")

    def start_weight_update(self):
        self.calls.append("start")

    def update_weights(self, update_info):
        self.calls.append([name for name, _ in update_info["named_tensors"]])
        self.tensors |= dict(update_info["named_tensors"])

    def finish_weight_update(self, version):
        self.calls.append(f"finish {version}")
        self.weight_version = version + self._version_shift

    def close(self):
        pass


def buckets():
    """Yield three layers, made one at a time as an exporter does."""
    yield [("embed", torch.ones(4, 2))]
    yield [("q", torch.zeros(2, 2)), ("k", torch.full((2,), 3.0, dtype=torch.bfloat16))]
    yield [("norm", torch.ones(2))]


def test_every_bucket_goes_through_one_session_in_order():
    engine = RecordingEngine()
    sync_weights(buckets(), TRANSPORTS.get("direct"), engine, 5)
    assert engine.calls == ["start", ["embed"], ["q", "k"], ["norm"], "finish 5"]
    assert engine.weight_version == 5


def test_the_direct_transport_hands_tensors_over_without_a_copy():
    tensor = torch.arange(3.0)
    engine = RecordingEngine()
    sync_weights([[("w", tensor)]], TRANSPORTS.get("direct"), engine, 0)
    assert engine.tensors["w"] is tensor


def test_a_sync_reports_bytes_and_buckets():
    metrics = sync_weights(buckets(), TRANSPORTS.get("direct"), RecordingEngine(), 0)
    assert to_floats(metrics) == {
        "weight_sync/bytes": 4 * 8 + 4 * 4 + 2 * 2 + 4 * 2,
        "weight_sync/num_buckets": 3,
    }


def test_an_engine_that_reports_another_version_afterwards_is_refused():
    with pytest.raises(WeightSyncError, match=r"reports weights 4 after a sync of 5") as caught:
        sync_weights(buckets(), TRANSPORTS.get("direct"), RecordingEngine(version_shift=-1), 5)
    assert caught.value.role == "rollout"


def test_a_sync_that_breaks_off_does_not_give_the_engine_its_version():
    def broken():
        yield [("embed", torch.ones(2))]
        raise WeightSyncError("a rank is gone", rank=1)

    engine = RecordingEngine()
    with pytest.raises(WeightSyncError, match="a rank is gone"):
        sync_weights(broken(), TRANSPORTS.get("direct"), engine, 5)
    assert engine.weight_version == -1
    assert engine.calls == ["start", ["embed"]]


def test_an_unknown_transport_names_the_key():
    with pytest.raises(
        UserError, match=r"rollout\.weight_transport='direkt'.*Did you mean 'direct'"
    ):
        TRANSPORTS.get("direkt")
