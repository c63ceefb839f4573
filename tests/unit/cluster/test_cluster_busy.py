"""The share of the time in which engines have requests, by a clock of the test's own."""

from __future__ import annotations

import pytest

from mcore_rl.cluster.busy import BusyTimes


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_the_share_is_the_mean_over_engines_of_the_time_with_requests():
    clock = Clock()
    busy = BusyTimes(2, clock)
    clock.now = 102
    busy.begin(0)
    clock.now = 103
    busy.begin(0)  # a second batch beside the first counts no time twice
    busy.begin(1)
    clock.now = 105
    busy.end(0)
    busy.end(1)
    clock.now = 108
    busy.end(0)
    clock.now = 110
    assert busy.share() == pytest.approx((6 / 10 + 2 / 10) / 2)


def test_what_runs_on_counts_in_the_next_share_too():
    clock = Clock()
    busy = BusyTimes(1, clock)
    busy.begin(0)
    clock.now = 104
    assert busy.share() == 1.0
    clock.now = 105
    busy.end(0)
    clock.now = 108
    assert busy.share() == 0.25
    assert busy.share() == 0.0  # no time has passed
