"""The journal of a run, and the run done again from it."""

from __future__ import annotations

import numpy as np
import pytest

from mcore_rl.errors import UserError
from mcore_rl.loop.difference import compare
from mcore_rl.loop.journal import FORMAT, Key, Score, StepRecord, read_step, steps_of, write_step
from mcore_rl.observability.run_folder import JOURNAL
from mcore_rl.rollout.base import GenerationRequest, SamplingParams
from mcore_rl.types import VersionSpan
from tests.carriers import make_result
from tests.unit.loop.loop_runs import replay_in, run_in

STALE = ("trainer.loop=overlapped", "trainer.max_staleness=2", "rollout.host=process")
FILTERED = ("algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=seq_reward")


def result(token_ids, finish_reason="stop", versions=()):
    logprobs = [-0.1 * token for token in token_ids]
    return make_result(
        token_ids=token_ids, logprobs=logprobs, finish_reason=finish_reason, versions=versions
    )


def test_a_step_comes_back_as_it_was_written(tmp_path):
    record = StepRecord(
        weights={"b": "float32[2]:0a", "a": "float32[]:ff"},
        answers=[
            (Key(2**31 - 1, 2**32 - 1), result([3, 1, 4], versions=[VersionSpan(6, 0, 3)])),
            (Key(0, 0), result([], "abort")),
            (Key(5, 7), result([9], "length", [VersionSpan(6, 0, 1), VersionSpan(7, 1, 1)])),
        ],
        scores=[
            Score("train:3", 1, 0.1, "scored", {"acc": 1 / 3}, "7"),
            Score("x", 0, 0.0, "failed", {}, None),
        ],
    )
    write_step(tmp_path, 7, record)
    found = read_step(tmp_path, 7)
    assert list(found.weights.items()) == list(record.weights.items())
    assert found.scores == record.scores
    assert not found.has_routes
    for (key, mine), (wanted_key, wanted) in zip(found.answers, record.answers, strict=True):
        assert key == wanted_key
        assert mine.token_ids.tolist() == wanted.token_ids.tolist()
        assert mine.logprobs.tobytes() == wanted.logprobs.tobytes()
        assert mine.finish_reason == wanted.finish_reason
        assert list(mine.versions) == list(wanted.versions)


def test_a_token_takes_8_bytes(tmp_path):
    answers = [(Key(n, n), result(range(1000))) for n in range(100)]
    write_step(tmp_path, 0, StepRecord({}, answers))
    [file] = tmp_path.iterdir()
    assert file.stat().st_size < 8.1 * 100 * 1000


def test_the_key_of_a_request_is_of_its_seed_and_its_prompt():
    def key(seed, tokens):
        sampling = SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=3, seed=seed)
        ids = np.asarray(tokens, np.int32)
        return Key.of(GenerationRequest(prompt_token_ids=ids, sampling=sampling))

    assert key(1, [2, 3]) == key(1, [2, 3])
    assert len({key(1, [2, 3]), key(2, [2, 3]), key(1, [3, 2]), key(1, [2])}) == 4


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (*FILTERED, "rollout.n=2"),
        ("algorithm.adv_estimator=remax",),
        ("algorithm.adv_estimator=gae",),
        STALE,
        (*STALE, *FILTERED, "rollout.n=2"),
    ],
)
def test_a_replay_gives_metrics_and_weights_bit_for_bit_and_asks_no_engine(tmp_path, overrides):
    keys = (*overrides, "trainer.test_freq=2")
    run = run_in(tmp_path, *keys, steps=5, num_val=2)
    replay = replay_in(tmp_path, *keys, steps=5, num_val=2)
    assert replay.metrics == run.metrics
    found = compare(replay.folder, run.folder)
    assert found.is_equal
    assert found.num_steps == found.num_tensors == 6  # of 5 updates, one tensor
    assert replay.counts["generate"] == 0
    assert replay.counts["actor.update"] == run.counts["actor.update"]
    assert len(replay.lines("samples.jsonl")) == len(run.lines("samples.jsonl"))


@pytest.mark.parametrize("crash_at", [("actor.update", 5), ("send_weights", 3), ("generate", 4)])
def test_a_run_that_crashed_and_went_on_is_replayed_as_one(tmp_path, crash_at):
    keys = (*STALE, "trainer.save_freq=2")
    run_in(tmp_path, *keys, steps=5, crash_at=crash_at)
    run = run_in(tmp_path, *keys, steps=5)
    assert steps_of(run.folder / JOURNAL) == [0, 1, 2, 3, 4, 5]
    assert compare(replay_in(tmp_path, *keys, steps=5).folder, run.folder).is_equal


def test_a_run_that_did_not_end_is_replayed_as_far_as_it_came(tmp_path):
    crashed = run_in(tmp_path, *STALE, steps=5, crash_at=("actor.update", 7))
    assert len(crashed.metrics) == 3
    replay = replay_in(tmp_path, *STALE, steps=5)
    assert replay.is_stopped
    assert len(replay.metrics) == 3
    found = compare(replay.folder, crashed.folder)
    assert found.is_equal
    assert found.num_steps == 3


def test_what_changes_first_is_named(tmp_path):
    run = run_in(tmp_path, "actor.optim.lr=0.5", steps=4)
    replay = replay_in(tmp_path, "actor.optim.lr=0.5", "actor.clip_ratio_high=0.01", steps=4)
    found = compare(replay.folder, run.folder)
    assert not found.is_equal
    assert found.metric.startswith("step ")


def test_other_prompts_than_those_of_the_run_are_refused(tmp_path):
    run_in(tmp_path)
    with pytest.raises(UserError, match="step 0: the run did not ask for a prompt of"):
        replay_in(tmp_path, "data.seed=5")


def test_a_run_whose_routes_were_replayed_is_refused(tmp_path):
    write_step(tmp_path / "run" / JOURNAL, 0, StepRecord({}, has_routes=True))
    with pytest.raises(UserError, match="R3"):
        replay_in(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and so on", b"\x93NUMPY"])
def test_a_file_that_is_no_step_is_one_line(tmp_path, content):
    (tmp_path / "step_00003.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"step_00003.npz is no step of a journal"):
        read_step(tmp_path, 3)


def test_another_format_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("mcore_rl.loop.journal.FORMAT", FORMAT + 1)
    write_step(tmp_path, 3, StepRecord({}))
    monkeypatch.undo()
    with pytest.raises(UserError, match=f"it is of format {FORMAT + 1}, and this is {FORMAT}"):
        read_step(tmp_path, 3)


def test_a_folder_without_steps_is_one_line(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="holds no step"):
        replay_in(tmp_path)
