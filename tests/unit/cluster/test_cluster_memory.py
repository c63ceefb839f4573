"""What is measured of a run is what the fullest worker held, by phase."""

from mcore_rl.cluster.group import done
from mcore_rl.cluster.memory import Measured, measured
from mcore_rl.cluster.phases import Phase
from mcore_rl.workers.roles import Actor, Memory, MemoryUse


class Workers:
    step = None

    def __init__(self, *uses):
        self.uses, self.world_size = uses, len(uses)

    def submit(self, calls):
        assert {one.method for one in calls.values()} == {Memory.memory_use}
        return {rank: done(self.uses[rank]) for rank in calls}


def test_the_worker_that_held_most_counts_in_each_phase():
    one = MemoryUse({Actor.update: 5, Actor.logprobs: 2, Actor.offload: 9}, 3, True)
    two = MemoryUse({Actor.update: 4, Actor.record_logprobs: 6}, 8, True)
    peaks = {Phase.LOGPROBS: 6, Phase.TRAIN: 5}
    assert measured(Workers(one, two)) == Measured(peaks=peaks, held=8, is_of_host=True)


def test_workers_that_cannot_tell_tell_nothing():
    assert measured(Workers(None, None)) is None
