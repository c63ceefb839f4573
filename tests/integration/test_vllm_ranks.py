"""Which rank and device vLLM takes inside a train worker, and which ranks keep routed experts: what
on CUDA goes wrong in silence, or in the middle of a run, and can be asked of vLLM without a device.
"""

from __future__ import annotations

from tests.integration import vllm_cases as cases


def test_an_engine_of_one_device_takes_that_of_its_train_worker(in_vllm):
    """Device 0 of every machine would hold the engines of all its workers otherwise."""
    assert in_vllm(cases.device_taken, 13, 5, is_apart=False) == (13, 5)


def test_an_engine_in_a_process_of_its_own_takes_the_first_device_that_it_sees(in_vllm):
    assert in_vllm(cases.device_taken, 13, 5, is_apart=True) == (0, 0)


def test_every_rank_of_an_engine_in_train_workers_keeps_routes(in_vllm):
    """Each of its ranks has a scheduler, which stops without them; the first part says that vLLM
    still needs the repair."""
    assert in_vllm(cases.second_rank_keeps_routes) == (False, True)
