"""What a worker holds at most is told by call, and for what was done since it was asked last."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mcore_rl.workers import memory
from mcore_rl.workers.memory import MemoryGauge, ResidentSet, meter_of
from mcore_rl.workers.roles import Actor, Rollout

MIB, GIB = 2**20, 2**30


class Script:
    """A meter that says what it was told."""

    is_of_host = True

    def __init__(self, *peaks):
        self.peaks, self.begun = list(peaks), 0

    def begin(self):
        self.begun += 1

    def peak(self):
        return self.peaks.pop(0)

    def settled(self):
        return 7


def watched(meter):
    gauge = MemoryGauge(meter)
    handlers = {Actor.update: lambda share: {}, Rollout.generate: lambda requests: requests}
    return gauge, gauge.watched(handlers)


def test_each_call_has_a_peak_of_its_own_and_the_last_ones_are_told_together():
    gauge, does = watched(Script(3 * GIB, GIB, 2 * GIB, GIB, 4 * GIB))
    assert does[Rollout.generate](["a"]) == ["a"]
    does[Rollout.generate]([])
    assert does[Actor.update](None) == {}
    assert gauge.take_peak() == 3 * GIB
    does[Actor.update](None)
    assert gauge.take_peak() == GIB
    does[Actor.update](None)
    use = pickle.loads(pickle.dumps(gauge.memory_use()))  # it crosses processes
    assert use.peaks == {Rollout.generate: 3 * GIB, Actor.update: 4 * GIB}
    assert (use.held, use.is_of_host) == (7, True)


def test_where_nothing_tells_calls_are_left_as_they_are():
    gauge, does = watched(None)
    assert does[Actor.update](None) == {}
    assert gauge.memory_use() is gauge.take_peak() is None


@pytest.mark.parametrize("file", ["status", "clear_refs"])
def test_a_kernel_that_does_not_tell_is_not_asked_again(monkeypatch, tmp_path, file):
    real = Path

    def proc(path):
        (tmp_path / "status").write_text("VmRSS:\t1 kB\n")  # of a sandbox: no VmHWM
        return tmp_path / ("status" if file == "status" else "absent/file")

    monkeypatch.setattr(memory, "Path", lambda path: proc(path) if file in path else real(path))
    assert meter_of(torch.device("cpu")) is None


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc/self/clear_refs elsewhere")
def test_the_resident_set_counts_from_when_it_was_made_and_forgets_a_peak_that_is_over():
    ballast = np.ones(64 * MIB, np.uint8)
    meter = ResidentSet()
    meter.begin()
    held = np.ones(100 * MIB, np.uint8)
    more = np.ones(200 * MIB, np.uint8)
    del more
    # The interpreter itself moves by less than 8 MiB.
    assert meter.peak() == pytest.approx(300 * MIB, abs=8 * MIB)
    meter.begin()
    assert meter.peak() == pytest.approx(100 * MIB, abs=8 * MIB)
    assert meter.settled() == pytest.approx(100 * MIB, abs=8 * MIB)
    assert len(held) + len(ballast) == 164 * MIB
