"""The processes of the other tests: results by rank, and no failure that goes unseen or hangs."""

import os
import time

import pytest

from tests.distributed import process_cases as cases
from tests.processes import ProcessPool, RankError


@pytest.fixture(scope="module")
def own_pool():
    pool = ProcessPool()
    yield pool
    pool.close()


def test_results_come_back_by_rank_from_the_same_processes(own_pool):
    first = own_pool.run(cases.add_ranks, 2, 10)
    second = own_pool.run(cases.add_ranks, 2, 20)
    assert [number for number, _ in first] == [11, 11]
    assert [number for number, _ in second] == [21, 21]
    pids = [pid for _, pid in first]
    assert len({os.getpid(), *pids}) == 3
    assert pids == [pid for _, pid in second]


def test_a_failing_rank_is_reported_with_its_traceback_at_once(own_pool):
    own_pool.run(cases.add_ranks, 2, 0)  # starting them may take long
    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 ---\n.*(?s:.*)ValueError: the reason"):
        own_pool.run(cases.fail_on_rank_1, 2)
    assert time.monotonic() - start < 30


def test_a_rank_that_hangs_or_dies_fails_the_run_and_the_next_one_works(own_pool):
    with pytest.raises(RankError, match="did not answer within"):
        own_pool.run(cases.hang_on_rank_1, 2, timeout_s=8)
    with pytest.raises(RankError, match="rank 1 ---\nthe process died"):
        own_pool.run(cases.die_on_rank_1, 2)
    assert [number for number, _ in own_pool.run(cases.add_ranks, 2, 0)] == [1, 1]
