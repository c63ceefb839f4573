"""Checkpoints of a run: whatever moment it dies at, going on gives the uninterrupted run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from mcore_rl.errors import CheckpointError, UserError
from mcore_rl.loop.checkpoints import POINTER
from mcore_rl.loop.validate import validate
from mcore_rl.observability.run_folder import read_config
from tests.unit.loop import fake_workers
from tests.unit.loop.fake_workers import make_prompts
from tests.unit.loop.loop_runs import run_in

STEPS = 4
# Everything that a checkpoint keeps matters here: weights, schedule, place in the data (two and a
# half steps are an epoch), and a KL coefficient that moves.
OVERRIDES = [
    "actor.policy_loss.loss_mode=geo_mean",
    "algorithm.use_kl_in_reward=true",
    "algorithm.kl_ctrl.type=adaptive",
    "algorithm.kl_ctrl.kl_coef=0.3",
    "algorithm.kl_ctrl.horizon=20",
    "trainer.test_freq=2",
    "data.val_files=unread",
    "trainer.save_freq=1",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run_in(tmp_path_factory.mktemp("finished"), *OVERRIDES, steps=STEPS, num_val=3)


@pytest.fixture
def whole(finished, tmp_path):
    """Return an uninterrupted run, whose folder "whole" each test has for itself."""
    shutil.copytree(finished.folder, tmp_path / "whole")
    return replace(finished, folder=tmp_path / "whole")


# Of an uninterrupted run: calls of each method; the last two of "generate" are validations.
CRASHES = [
    ("send_weights", 0),
    ("generate", 0),
    ("actor.logprobs", 0),
    ("generate", 3),
    ("actor.logprobs", 2),
    ("actor.ref_logprobs", 1),
    ("actor.update", 2),
    ("actor.update", 3),
    ("actor.update", 7),
    ("send_weights", 2),
    ("actor.begin_save", 0),
    ("actor.begin_save", 2),
    ("actor.begin_save", 3),
    ("actor.save_state", 1),
    ("actor.finish_save", 0),
    ("actor.finish_save", 2),
    ("generate", 7),
]


@pytest.mark.parametrize(("method", "number"), CRASHES)
def test_a_run_that_died_at_any_call_goes_on_to_the_same_numbers(run_loop, whole, method, number):
    crashed = run_loop(*OVERRIDES, steps=STEPS, num_val=3, crash_at=(method, number))
    resumed = run_loop(*OVERRIDES, steps=STEPS, num_val=3)
    assert resumed.metrics == whole.metrics
    assert resumed.lines("samples.jsonl") == whole.lines("samples.jsonl")
    assert resumed.workers.actor.weights.equal(whole.workers.actor.weights)
    assert resumed.checkpoints == whole.checkpoints  # a half-written one is gone
    num_saved = crashed.counts["actor.finish_save"] - (method == "actor.finish_save")
    assert resumed.counts["actor.load"] == (num_saved > 0)
    assert resumed.counts["actor.update"] == 2 * (STEPS - num_saved)


def test_a_crash_while_saving_leaves_the_previous_checkpoint_in_force(run_loop):
    crashed = run_loop(*OVERRIDES, steps=STEPS, num_val=3, crash_at=("actor.begin_save", 1))
    assert crashed.checkpoints == ["global_step_1", "global_step_2.partial", POINTER]
    assert (crashed.folder / "checkpoints" / POINTER).read_text() == "1"


def test_a_crash_before_the_pointer_moved_repeats_the_step(run_loop, whole):
    """The folder of step 3 is there under its name, and another one that nothing names."""
    crashed = run_loop(*OVERRIDES, steps=STEPS, num_val=3, crash_at=("actor.begin_save", 3))
    checkpoints = crashed.folder / "checkpoints"
    (checkpoints / POINTER).write_text("2")
    (checkpoints / "global_step_3" / "controller.json").write_text("half written")
    (checkpoints / "global_step_3" / "stray").write_text("")
    resumed = run_loop(*OVERRIDES, steps=STEPS, num_val=3)
    assert resumed.counts["actor.update"] == 2 * 2
    assert resumed.metrics == whole.metrics
    assert not (checkpoints / "global_step_3" / "stray").exists()


def test_a_finished_run_that_is_started_again_trains_nothing_and_ends_equal(run_loop, whole):
    again = run_loop(*OVERRIDES, steps=STEPS, num_val=3, folder="whole")
    assert again.counts["actor.update"] == 0
    assert again.metrics == whole.metrics
    assert again.workers.engines[0].weight_version == STEPS


def test_a_finished_run_can_be_made_longer(run_loop, whole):
    longer = run_loop(*OVERRIDES, steps=STEPS + 2, num_val=3, folder="whole")
    straight = run_loop(*OVERRIDES, steps=STEPS + 2, num_val=3, folder="straight")
    assert longer.counts["actor.update"] == 2 * 2
    assert longer.metrics == straight.metrics


def test_engines_get_the_resumed_weights_before_anything_is_generated(run_loop):
    run_loop(*OVERRIDES, steps=STEPS, num_val=3, crash_at=("generate", 5))
    resumed = run_loop(*OVERRIDES, steps=STEPS, num_val=3)
    # The folder of the model has other weights by then.
    first = ["actor.load", "sync to 2", "loaded_digests", "generate with 2"]
    assert resumed.calls[:4] == first


def test_checkpoints_are_kept_as_many_as_asked_for(run_loop):
    run = run_loop(*OVERRIDES, "trainer.max_ckpt_to_keep=2", steps=12)
    assert run.checkpoints == ["global_step_11", "global_step_12", POINTER]


@pytest.mark.parametrize(("mode", "pick"), [("max", max), ("min", min)])
def test_the_best_checkpoint_is_kept_beside_the_last(run_loop, mode, pick):
    keep = [
        "trainer.save_freq=1",
        "trainer.max_ckpt_to_keep=1",
        "trainer.best_ckpt_metric=reward/mean",
        f"trainer.best_ckpt_mode={mode}",
    ]
    run = run_loop(*keep, steps=8)
    rewards = {line["step"]: line["reward/mean"] for line in run.metrics if line["step"] > 0}
    best = pick(rewards, key=lambda step: (rewards[step], step if mode == "max" else -step))
    assert run.checkpoints == [f"global_step_{best}", "global_step_8", POINTER]


def test_the_best_is_sought_among_the_checkpoints_that_were_validated(run_loop):
    """Validation every three steps, checkpoints every two: global_step_6 alone has a value."""
    keep = [
        "data.val_files=unread",
        "trainer.test_freq=3",
        "trainer.save_freq=2",
        "trainer.max_ckpt_to_keep=1",
        "trainer.best_ckpt_metric=eval/val/accuracy",
    ]
    run = run_loop(*keep, steps=10, num_val=3)
    assert run.checkpoints == ["global_step_10", "global_step_6", POINTER]


def test_a_metric_that_is_no_number_in_a_step_does_not_make_it_the_best(run_loop):
    reward = """
import itertools
CALLS = itertools.count()
QUALITY = [0.0, float("nan"), 2.0, 1.0]  # of each step's 4 * 3 responses
def compute_score(data_source, solution_str, ground_truth, extra_info):
    return {"score": len(solution_str), "quality": QUALITY[next(CALLS) // 12]}
"""
    keep = [
        "trainer.save_freq=1",
        "trainer.max_ckpt_to_keep=1",
        "trainer.best_ckpt_metric=reward/quality/mean",
    ]
    run = run_loop(*keep, steps=4, reward=reward)
    assert run.checkpoints == ["global_step_2", "global_step_4", POINTER]


@pytest.mark.parametrize(
    ("metric", "meant"),
    [("rewards/mean", "reward/mean"), ("actor/gradnorm", "actor/grad_norm")],
)
def test_a_metric_that_no_step_has_stops_the_run_after_the_first(run_loop, metric, meant):
    keep = ["trainer.save_freq=4", "trainer.max_ckpt_to_keep=1"]
    with pytest.raises(UserError, match=rf"'{meant}'\?") as caught:
        run_loop(*keep, f"trainer.best_ckpt_metric={metric}", steps=6, folder="run")
    assert str(caught.value).startswith(f"trainer.best_ckpt_metric='{metric}' is not among")
    assert run_loop(folder="run", steps=6).metrics  # what it logged is no obstacle


def test_a_metric_of_validation_that_is_misspelt_stops_the_run_after_the_first_validation(run_loop):
    keep = [
        "data.val_files=unread",
        "trainer.test_freq=2",
        "trainer.save_freq=4",
        "trainer.max_ckpt_to_keep=1",
        "trainer.best_ckpt_metric=eval/val/acuracy",
    ]
    with pytest.raises(UserError, match=r"Did you mean 'eval/val/accuracy'\?"):
        run_loop(*keep, steps=6, num_val=3)


def test_a_number_that_a_reward_gives_only_at_times_may_tell_the_best(run_loop):
    reward = """
import itertools
CALLS = itertools.count()
def compute_score(data_source, solution_str, ground_truth, extra_info):
    return {"score": len(solution_str)} | ({"quality": 1.0} if next(CALLS) >= 3 * 12 else {})
"""
    keep = ["trainer.save_freq=4", "trainer.max_ckpt_to_keep=1"]
    metric = "trainer.best_ckpt_metric=reward/quality/mean"
    assert len(run_loop(*keep, metric, steps=6, reward=reward).metrics) == 6


def test_a_checkpoint_is_written_every_so_many_steps_and_after_the_last(run_loop):
    every_two = run_loop("trainer.save_freq=2", steps=5)
    assert every_two.checkpoints == ["global_step_2", "global_step_4", "global_step_5", POINTER]
    assert run_loop(folder="only_last", steps=5).checkpoints == ["global_step_5", POINTER]


def test_an_asynchronous_run_that_died_goes_on_to_the_same_numbers(run_loop, whole):
    """Step 1 is written while steps 1 and 2 are trained, so the crash in step 1 costs both."""
    how = {"steps": STEPS, "num_val": 3, "save_takes": 1}
    overrides = [*OVERRIDES, "trainer.async_save=true"]
    crashed = run_loop(*overrides, **how, crash_at=("actor.update", 3))
    assert crashed.checkpoints == ["global_step_1.partial"]
    resumed = run_loop(*overrides, **how)
    assert resumed.counts["actor.update"] == 2 * STEPS
    assert resumed.metrics == whole.metrics
    assert resumed.workers.actor.weights.equal(whole.workers.actor.weights)
    assert resumed.checkpoints == whole.checkpoints
    for step in range(1, STEPS + 1):
        files = [
            run.folder / "checkpoints" / f"global_step_{step}" / name
            for run in (resumed, whole)
            for name in ("controller.json", "actor/state.json")
        ]
        assert [file.read_text() for file in files[:2]] == [file.read_text() for file in files[2:]]


def test_an_asynchronous_checkpoint_comes_into_force_when_all_of_it_is_written(run_loop):
    """Asked for at the beginning of each step, and waited for by the next one and by the end."""
    overrides = ["trainer.async_save=true", "trainer.save_freq=2"]
    run = run_loop(*overrides, steps=5, save_takes=1)
    about_saves = [
        (method, *(args[0] if method == "actor.save_state" else ()), step)
        for (method, args), step in zip(run.workers.calls, run.workers.steps, strict=True)
        if "save" in method
    ]
    assert about_saves == [
        ("actor.begin_save", 1),
        ("actor.save_state", False, 2),
        ("actor.save_state", False, 3),
        ("actor.finish_save", 3),
        ("actor.begin_save", 3),
        ("actor.save_state", False, 4),
        ("actor.save_state", True, 4),
        ("actor.finish_save", 4),
        ("actor.begin_save", 4),
        ("actor.save_state", True, 4),
        ("actor.finish_save", 4),
    ]
    assert run.checkpoints == ["global_step_2", "global_step_4", "global_step_5", POINTER]


def test_a_rank_that_cannot_write_ends_the_run_at_the_next_step(run_loop, tmp_path):
    overrides = ["trainer.async_save=true", "trainer.save_freq=1"]
    with pytest.raises(CheckpointError) as caught:
        run_loop(*overrides, save_takes=5, save_problem="x cannot be written: disk full")
    assert str(caught.value) == (
        "[role worker, actor.save, rank 1, step 1] x cannot be written: disk full"
    )
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [
        "global_step_1.partial"
    ]


def damage(run, step, name="controller.json"):
    """Cut the last bytes off a file of a checkpoint and return the checkpoint."""
    folder = run.folder / "checkpoints" / f"global_step_{step}"
    (folder / name).write_text((folder / name).read_text()[:-5])
    return folder


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no such folder"),
        (lambda folder: (folder / "controller.json").unlink(), "controller.json is missing"),
        (
            lambda folder: (folder / "controller.json").write_text('{"step": 4, "fil'),
            "controller.json cannot be read (Unterminated string",
        ),
        (
            lambda folder: (folder / "controller.json").write_text("[" * 10**5),
            "controller.json cannot be read (it is nested more than 100 levels deep",
        ),
        (
            lambda folder: (folder / "controller.json").write_text('{"files": 5}'),
            "controller.json cannot be read (",
        ),
        (
            lambda folder: (folder / "actor" / "state.json").unlink(),
            "actor/state.json is missing",
        ),
        (
            lambda folder: (folder / "actor" / "state.json").write_text("{}"),
            "actor/state.json has 2 bytes and was written with ",
        ),
    ],
)
def test_a_damaged_checkpoint_stops_the_run_and_the_one_before_is_named(
    run_loop, whole, spoil, problem
):
    checkpoints = whole.folder / "checkpoints"
    spoil(checkpoints / f"global_step_{STEPS}")
    damage(whole, STEPS - 1, "actor/state.json")
    with pytest.raises(CheckpointError) as caught:
        run_loop(*OVERRIDES, steps=STEPS, num_val=3, folder="whole")
    assert caught.value.role == "controller"
    text = caught.value.message
    assert text.startswith(f"{checkpoints}/global_step_{STEPS} is not whole: {problem}")
    assert text.endswith(
        "global_step_2 is whole: go on from it with trainer.resume_mode=resume_path "
        f"trainer.resume_from_path={checkpoints}/global_step_2"
    )
    assert "\n" not in text


def test_without_a_whole_checkpoint_the_message_says_so(run_loop, whole):
    for step in range(1, STEPS + 1):
        damage(whole, step)
    with pytest.raises(CheckpointError, match="No other checkpoint of the run is whole"):
        run_loop(*OVERRIDES, steps=STEPS, num_val=3, folder="whole")


def test_a_damaged_pointer_stops_the_run_and_the_last_checkpoint_is_named(run_loop, whole):
    (whole.folder / "checkpoints" / POINTER).write_text("")
    with pytest.raises(CheckpointError, match=rf"names no step.*global_step_{STEPS} is whole"):
        run_loop(*OVERRIDES, steps=STEPS, num_val=3, folder="whole")


def test_a_run_goes_back_to_an_earlier_checkpoint_of_its_own(run_loop, whole):
    """It does the later steps again, to the same numbers, whatever is left of them."""
    metrics, samples = whole.metrics, whole.lines("samples.jsonl")
    folder = damage(whole, STEPS, "actor/state.json")
    back = [
        "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={folder.parent}/global_step_2",
    ]
    how = {"steps": STEPS, "num_val": 3, "folder": "whole"}
    run_loop(*OVERRIDES, *back, **how, crash_at=("actor.update", 1))
    assert (folder.parent / POINTER).read_text() == "2"  # what "auto" goes on from
    again = run_loop(*OVERRIDES, **how)
    assert again.counts["actor.update"] == 2 * 2
    assert again.metrics == metrics
    assert again.lines("samples.jsonl") == samples


def test_steps_done_again_are_kept_and_not_those_left_from_before(run_loop, whole):
    """global_step_4 is later than what the pointer names and counts for nothing."""
    folder = whole.folder / "checkpoints"
    overrides = [
        *OVERRIDES,
        "trainer.max_ckpt_to_keep=1",
        "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={folder}/global_step_2",
    ]
    how = {"steps": STEPS, "num_val": 3, "folder": "whole"}
    again = run_loop(*overrides, **how, crash_at=("actor.update", 2))
    assert again.checkpoints == ["global_step_3", "global_step_4", POINTER]
    assert (folder / POINTER).read_text() == "3"


def test_a_run_begins_with_a_checkpoint_of_another_and_goes_on_from_its_own(run_loop, whole):
    path = whole.folder / "checkpoints" / "global_step_2"
    overrides = [
        *OVERRIDES,
        "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={path}",
    ]
    branch = run_loop(*overrides, steps=STEPS, num_val=3, crash_at=("actor.update", 2))
    assert branch.counts["actor.load"] == 1
    assert branch.checkpoints == ["global_step_3", POINTER]
    branch = run_loop(*overrides, steps=STEPS, num_val=3)
    assert branch.counts["actor.update"] == 2
    assert branch.metrics == whole.metrics[2:]
    assert branch.workers.actor.weights.equal(whole.workers.actor.weights)


def test_other_data_of_as_many_rows_are_refused(run_loop, whole, monkeypatch):
    """One answer was corrected since."""
    stored = json.loads((whole.folder / "checkpoints/global_step_4/controller.json").read_text())
    assert stored["prompts"]["num_items"] == 10

    def with_another_answer(num, first, source):
        prompts = make_prompts(num, first, source)
        return [replace(prompts[0], ground_truth="w9"), *prompts[1:]]

    monkeypatch.setattr(fake_workers, "make_prompts", with_another_answer)
    with pytest.raises(UserError, match=r"data digest='\w+' differs from the resumed run's '\w+'"):
        run_loop(*OVERRIDES, steps=STEPS + 1, num_val=3, folder="whole")


def test_a_validation_alone_leaves_the_run_as_it_is(run_loop, whole):
    """Of the latest checkpoint and of an earlier one; each gives what the run itself logged."""
    files = ("metrics.jsonl", "samples.jsonl", f"checkpoints/{POINTER}")
    before = [(whole.folder / name).read_bytes() for name in files]
    only = [*OVERRIDES, "trainer.val_only=true"]
    latest = run_loop(*only, steps=STEPS, num_val=3, folder="whole", loop=validate)
    earlier = [
        "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={whole.folder}/checkpoints/global_step_2",
    ]
    run_loop(*only, *earlier, steps=STEPS, num_val=3, folder="whole", loop=validate)
    assert latest.counts["actor.update"] == latest.counts["actor.begin_save"] == 0
    assert [(whole.folder / name).read_bytes() for name in files] == before
    for step in (4, 2):
        folder = whole.folder / "validation" / f"global_step_{step}"
        [line] = replace(whole, folder=folder).metrics
        expected = {k: v for k, v in whole.metrics[step].items() if k.startswith(("eval/", "step"))}
        assert line == expected
        results = json.loads((folder / "results.json").read_text())
        assert results["step"] == step
        values = {k: v["value"] for k, v in results["data_sources"]["val"]["metrics"].items()}
        assert values == {k: v for k, v in expected.items() if k != "step"}
        samples = replace(whole, folder=folder).lines("samples.jsonl")
        assert samples == [
            sample
            for sample in whole.lines("samples.jsonl")
            if (sample["step"], sample["split"]) == (step, "val")
        ]


def test_a_validation_alone_of_a_new_run_is_of_the_first_weights(run_loop):
    only = ["trainer.val_only=true", "data.val_files=unread"]
    run = run_loop(*only, steps=2, num_val=3, loop=validate)
    assert run.calls == [
        "digests_of_model",
        "sync to 0",
        "loaded_digests",
        "generate with 0",
        "actor.logprobs",
        "generate with 0",
    ]
    assert (run.folder / "validation/global_step_0/metrics.jsonl").exists()
    trained = run_loop("data.val_files=unread", steps=2, num_val=3)  # the folder is free
    assert trained.counts["actor.update"] == 4


SEVERAL = ["rollout.val_kwargs.n=3", "rollout.val_kwargs.do_sample=true"]


def test_a_validation_alone_leaves_every_sample_and_metrics_with_their_intervals(run_loop):
    """Every metric is a mean over the rows of the table, and lies within its interval."""
    only = ["trainer.val_only=true", "data.val_files=unread", "trainer.log_val_generations=0"]
    run = run_loop(*only, *SEVERAL, steps=2, num_val=40, loop=validate)
    folder = run.folder / "validation" / "global_step_0"
    assert read_config(folder / "config.yaml") == read_config(run.folder / "config.yaml")
    rows = pq.read_table(folder / "samples.parquet").to_pylist()
    assert [(row["uid"], row["index"]) for row in rows] == [
        (f"val:{100 + i}", j) for i in range(40) for j in range(3)
    ]
    found = json.loads((folder / "results.json").read_text())["data_sources"]["val"]
    assert (found["num_prompts"], found["num_samples"]) == (40, 120)
    metrics = found["metrics"]
    rewards = np.array([row["reward"] for row in rows]).reshape(40, 3)
    tokens = [row["response_tokens"] for row in rows]
    expected = {
        "accuracy": rewards.mean(),
        "accuracy/std": rewards.std(axis=1).mean(),
        "best_at_1": rewards.mean(),
        "best_at_3": rewards.max(axis=1).mean(),
        "response_tokens/mean": np.mean(tokens),
        "truncated_frac": np.mean([row["finish_reason"] == "length" for row in rows]),
    }
    for name, value in expected.items():
        assert metrics[f"eval/val/{name}"]["value"] == pytest.approx(value), name
    for key, estimate in metrics.items():
        assert estimate["low"] <= estimate["value"] <= estimate["high"], key
    accuracy = metrics["eval/val/accuracy"]
    deviation = rewards.mean(axis=1).std() / np.sqrt(40)
    width = accuracy["high"] - accuracy["low"]
    assert width == pytest.approx(2 * 1.96 * deviation, rel=0.1)  # of 1000 resamples


def test_a_checkpoint_of_another_kind_of_run_is_refused(run_loop, whole):
    folder = whole.folder / "checkpoints" / "global_step_2"
    state = json.loads((folder / "controller.json").read_text())
    state["sequences"] = state.pop("prompts")
    (folder / "controller.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"another kind of run.* no 'prompts'"):
        run_loop(
            *OVERRIDES,
            "trainer.resume_mode=resume_path",
            f"trainer.resume_from_path={folder}",
            steps=STEPS,
        )


def test_a_checkpoint_that_cannot_be_written_stops_the_run_with_its_step(run_loop, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file in the way")
    with pytest.raises(CheckpointError, match="global_step_1 cannot be written") as caught:
        run_loop("trainer.save_freq=1")
    assert caught.value.step == 1


def test_the_controller_s_part_of_a_checkpoint_is_readable(whole):
    file = whole.folder / "checkpoints" / "global_step_3" / "controller.json"
    state = json.loads(file.read_text())
    assert state["step"] == 3
    assert len(state["prompts"].pop("digest")) == 32
    assert state["prompts"] == {
        "epoch": 1,
        "position": 4,
        "num_items": 10,
        "seed": 0,
        "shuffle": True,
    }
    assert state["kl"]["kl_coef"] != 0.3
