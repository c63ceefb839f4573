"""What may be asked of an engine in which state, and who gets which result."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch

from mcore_rl import interruption
from mcore_rl.errors import RolloutError
from mcore_rl.rollout import load_engine
from mcore_rl.rollout.base import (
    EnginePart,
    EngineSpec,
    GenerationRequest,
    PauseMode,
    RolloutConfig,
    SamplingParams,
)
from mcore_rl.rollout.serving import STEPS_BETWEEN_POLLS, ServingEngine
from mcore_rl.types import VersionSpan
from mcore_rl.weight_sync.base import Link
from mcore_rl.weight_sync.digest import Manifest
from mcore_rl.weight_sync.direct import Tensors


@pytest.fixture
def engine(tmp_path):
    """A fake engine without an end token, which holds weights 0."""
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 50}))
    spec = EngineSpec(
        model_path=str(tmp_path),
        dtype="float32",
        max_model_len=64,
        stop_token_ids=[],
        config=RolloutConfig(name="fake"),
        run_folder=str(tmp_path),
    )
    link = Link(transport="direct", run_folder=str(tmp_path), engine=0, engine_rank=0)
    made = ServingEngine(load_engine(spec, link))
    update(made, 0)
    return made


def update(engine, version):
    engine.start_weight_update(version)
    tensors, manifest = [("w", torch.ones(2))], Manifest()
    manifest.add(tensors)
    engine.update_weights(Tensors(tensors))
    engine.finish_weight_update(manifest)


def requests(*lengths):
    """Return requests; without an end token a response has `max_tokens`, or fewer by its draw."""
    return [
        GenerationRequest(
            prompt_token_ids=np.array([1, 2], np.int32),
            sampling=SamplingParams(
                temperature=1.0, top_p=1.0, top_k=-1, max_tokens=length, seed=length
            ),
        )
        for length in lengths
    ]


def finish(engine):
    while engine.is_busy:
        engine.run()


def drawn(future):
    return [result.token_ids.tolist() for result in future.result()]


def test_batches_that_run_side_by_side_get_their_own_results_in_order(engine):
    first, second = engine.submit([requests(9, 3)])[0], engine.submit([requests(5)])[0]
    finish(engine)
    assert drawn(first) == [*drawn(_alone(engine, 9)), *drawn(_alone(engine, 3))]
    assert drawn(second) == drawn(_alone(engine, 5))


def _alone(engine, length):
    future = engine.submit([requests(length)])[0]
    finish(engine)
    return future


def test_a_batch_is_answered_before_a_longer_one_that_came_earlier(engine):
    long, short = engine.submit([requests(60)])[0], engine.submit([requests(1)])[0]
    engine.run()
    assert short.done()
    assert not long.done()


def test_a_pause_that_keeps_goes_on_with_new_weights_and_says_which_tokens_are_whose(engine):
    whole = drawn(_alone(engine, 20))
    future = engine.submit([requests(20)])[0]
    for _ in range(2):
        engine.run()
    engine.pause(PauseMode.KEEP)
    assert not engine.is_busy
    assert engine.health().num_unfinished == 1
    update(engine, 1)
    engine.resume()
    finish(engine)
    (result,) = future.result()
    num = len(result.token_ids)
    assert [result.token_ids.tolist()] == whole
    assert list(result.versions) == [VersionSpan(0, 0, 2), VersionSpan(1, 2, num)]


def test_requests_wait_while_an_engine_sleeps_and_go_on_with_the_weights_that_came(engine):
    whole = drawn(_alone(engine, 20))
    future = engine.submit([requests(20)])[0]
    for _ in range(2):
        engine.run()
    engine.sleep(2)
    assert not engine.is_busy
    engine.wake(EnginePart.WEIGHTS)
    update(engine, 1)
    assert not engine.is_busy, "its cache is asleep"
    engine.wake(EnginePart.KV_CACHE)
    finish(engine)
    (result,) = future.result()
    assert [result.token_ids.tolist()] == whole
    num = len(result.token_ids)
    assert list(result.versions) == [VersionSpan(0, 0, 2), VersionSpan(1, 2, num)]


def test_a_pause_that_aborts_ends_requests_with_what_they_have(engine):
    whole = drawn(_alone(engine, 20))
    future = engine.submit([requests(20)])[0]
    for _ in range(3):
        engine.run()
    engine.pause(PauseMode.ABORT)
    (result,) = future.result()
    assert result.finish_reason == "abort"
    assert result.token_ids.tolist() == whole[0][:3]
    assert engine.health().num_unfinished == 0


def test_a_pause_that_waits_ends_requests_first(engine):
    future = engine.submit([requests(20, 4)])[0]
    engine.pause(PauseMode.WAIT)
    assert {result.finish_reason for result in future.result()} <= {"stop", "length"}


def test_one_batch_is_aborted_and_the_others_go_on(engine):
    gone, stays = engine.submit([requests(30)])[0], engine.submit([requests(31)])[0]
    engine.run()
    engine.abort(gone)
    assert gone.result()[0].finish_reason == "abort"
    assert not stays.done()
    finish(engine)
    assert stays.result()[0].finish_reason == "length"


REFUSED = {
    "generate while taking weights": (["start"], "generate", "is taking weights"),
    "generate asleep": (["sleep 1"], "generate", "is asleep"),
    "generate with a part asleep": (["sleep 1", "wake weights"], "generate", "is asleep"),
    "generate after forgetting": (
        ["sleep 2", "wake weights", "wake kv"],
        "generate",
        "no complete",
    ),
    "start twice": (["start"], "start", "is taking weights already"),
    "start asleep": (["sleep 2"], "start", "is asleep"),
    "start while generating": (["submit"], "start", "has requests and no pause"),
    "update unopened": ([], "update", "is not taking weights"),
    "finish unopened": ([], "finish", "is not taking weights"),
    "sleep while taking weights": (["start"], "sleep 1", "is taking weights"),
    "sleep twice": (["sleep 1"], "sleep 1", "is asleep already"),
    "wake twice": (["sleep 1", "wake kv"], "wake kv", "has its kv_cache awake"),
    "wake awake": ([], "wake weights", "has its weights awake"),
    "pause twice": (["pause"], "pause", "is paused already"),
    "pause asleep": (["sleep 1"], "pause", "is asleep"),
    "resume unpaused": ([], "resume", "is not paused"),
    "resume while taking weights": (["pause", "start"], "resume", "is taking weights"),
    "resume after giving up": (["pause", "start", "abort"], "resume", "no complete weights"),
    "generate after giving up": (["start", "abort"], "generate", "no complete weights"),
}

ACTS = {
    "generate": lambda engine: engine.submit([requests(2)])[0],
    "submit": lambda engine: engine.submit([requests(50)])[0],
    "start": lambda engine: engine.start_weight_update(1),
    "update": lambda engine: engine.update_weights(Tensors([])),
    "finish": lambda engine: engine.finish_weight_update(Manifest()),
    "abort": lambda engine: engine.abort_weight_update(),
    "sleep 1": lambda engine: engine.sleep(1),
    "sleep 2": lambda engine: engine.sleep(2),
    "wake weights": lambda engine: engine.wake(EnginePart.WEIGHTS),
    "wake kv": lambda engine: engine.wake(EnginePart.KV_CACHE),
    "pause": lambda engine: engine.pause(PauseMode.KEEP),
    "resume": lambda engine: engine.resume(),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_state_does_not_allow_is_refused(engine, case):
    before, act, reason = REFUSED[case]
    for earlier in before:
        ACTS[earlier](engine)
    with pytest.raises(RolloutError, match=reason):
        ACTS[act](engine)


def test_an_engine_sleeps_and_wakes_part_by_part_and_again(engine):
    for _ in range(2):
        engine.sleep(1)
        engine.wake(EnginePart.WEIGHTS)
        update(engine, 3)
        engine.sleep(1)  # before its cache was woken
        engine.wake(EnginePart.WEIGHTS)
        engine.wake(EnginePart.KV_CACHE)
        assert len(drawn(_alone(engine, 4))) == 1


def test_what_goes_wrong_in_a_step_is_the_answer_to_all_and_ends_the_engine(engine, monkeypatch):
    futures = [engine.submit([requests(5)])[0], engine.submit([requests(6)])[0]]

    def fail():
        raise ZeroDivisionError("in a kernel")

    monkeypatch.setattr(engine._engine, "step", fail)
    engine.run()
    for future in futures:
        with pytest.raises(ZeroDivisionError, match="in a kernel"):
            future.result()
    with pytest.raises(RolloutError, match="has failed"):
        engine.submit([requests(2)])[0]


@pytest.fixture
def interrupted(monkeypatch):
    """This process is told that what it generates is wanted no more."""
    monkeypatch.setattr(interruption, "_is_asked", threading.Event())
    return interruption.ask


def test_requests_that_are_wanted_no_more_end_within_a_few_steps(engine, interrupted):
    """A response of 1000 tokens, and one that comes afterwards."""
    future = engine.submit([requests(1000)])[0]
    for _ in range(3 * STEPS_BETWEEN_POLLS):
        engine.run()
    assert not future.done()
    interrupted()
    for _ in range(STEPS_BETWEEN_POLLS):
        engine.run()
    [result] = future.result(timeout=0)
    assert result.finish_reason == "abort"
    assert 3 * STEPS_BETWEEN_POLLS <= len(result.token_ids) < 4 * STEPS_BETWEEN_POLLS
    engine.sleep(1)  # nothing is unfinished
    engine.wake(EnginePart.WEIGHTS)
    engine.wake(EnginePart.KV_CACHE)
    later = engine.submit([requests(1000)])[0]
    for _ in range(STEPS_BETWEEN_POLLS):
        engine.run()
    assert later.result(timeout=0)[0].finish_reason == "abort"


def test_ranks_of_an_engine_give_up_together(engine, interrupted, monkeypatch):
    """Each is told at another moment; one that went on alone would wait for the others forever."""
    monkeypatch.setattr(engine._engine, "any_rank", lambda is_so: True)  # another one was told
    future = engine.submit([requests(1000)])[0]
    for _ in range(STEPS_BETWEEN_POLLS):
        assert not future.done()
        engine.run()
    assert future.result(timeout=0)[0].finish_reason == "abort"
