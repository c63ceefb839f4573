"""What is measured of a run is what the fullest worker held, by phase."""

from typing import Any

from mcore_rl.cluster.group import done
from mcore_rl.cluster.memory import Measured, measured, peak_metrics
from mcore_rl.cluster.phases import Phase
from mcore_rl.metrics import to_floats
from mcore_rl.workers.roles import Actor, Memory, MemoryUse


class Workers:
    step = None

    def __init__(self, *uses, method=Memory.memory_use):
        self.uses, self.world_size, self.method = uses, len(uses), method

    def submit(self, calls):
        (method,) = {one.method for one in calls.values()}
        assert method == self.method
        return {rank: done(self.uses[rank]) for rank in calls}


def workers(*uses, **how) -> Any:
    return Workers(*uses, **how)


def test_the_worker_that_held_most_counts_in_each_phase():
    one = MemoryUse({Actor.update: 5, Actor.logprobs: 2, Actor.offload: 9}, 3, True)
    two = MemoryUse({Actor.update: 4, Actor.record_logprobs: 6}, 8, True)
    peaks = {Phase.LOGPROBS: 6, Phase.TRAIN: 5}
    assert measured(workers(one, two)) == Measured(peaks=peaks, held=8, is_of_host=True)


def test_the_peak_of_a_step_is_that_of_the_worker_that_held_most():
    peaks = workers(2 << 30, 3 << 30, method=Memory.take_peak)
    assert to_floats(peak_metrics(peaks)) == {"perf/memory_peak_gib": 3.0}
    assert peak_metrics(workers(None, None, method=Memory.take_peak)) == {}


def test_workers_that_cannot_tell_tell_nothing():
    assert measured(workers(None, None)) is None
