"""Checkpoints of a run: whatever moment it dies at, going on gives the uninterrupted run."""

from __future__ import annotations

import json

import pytest
from fake_workers import make_config
from omegaconf import OmegaConf

from mcore_rl.errors import CheckpointError, UserError
from mcore_rl.loop.resume import POINTER, open_run_folder

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


@pytest.fixture
def whole(run_loop):
    """An uninterrupted run."""
    return run_loop(*OVERRIDES, steps=STEPS, num_val=3, folder="whole")


# Of an uninterrupted run: calls of each method; the last two of "generate" are validations.
CRASHES = [
    ("sync_weights", 0),
    ("generate", 0),
    ("actor.logprobs", 0),
    ("generate", 3),
    ("actor.logprobs", 2),
    ("actor.ref_logprobs", 1),
    ("actor.update", 2),
    ("actor.update", 3),
    ("actor.update", 7),
    ("sync_weights", 2),
    ("actor.save", 0),
    ("actor.save", 2),
    ("actor.save", 3),
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
    num_saved = crashed.counts["actor.save"] - (method == "actor.save")
    assert resumed.counts["actor.load"] == (num_saved > 0)
    assert resumed.counts["actor.update"] == 2 * (STEPS - num_saved)


def test_a_crash_while_saving_leaves_the_previous_checkpoint_in_force(run_loop):
    crashed = run_loop(*OVERRIDES, steps=STEPS, num_val=3, crash_at=("actor.save", 1))
    assert crashed.checkpoints == ["global_step_1", "global_step_2.partial", POINTER]
    assert (crashed.folder / "checkpoints" / POINTER).read_text() == "1"


def test_a_crash_before_the_pointer_moved_repeats_the_step(run_loop, whole):
    """The folder of step 3 is there under its name, and another one that nothing names."""
    crashed = run_loop(*OVERRIDES, steps=STEPS, num_val=3, crash_at=("actor.save", 3))
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
    assert resumed.calls[:4] == ["place", "actor.load", "sync to 2", "generate with 2"]


def test_checkpoints_are_kept_as_many_as_asked_for(run_loop):
    run = run_loop(*OVERRIDES, "trainer.max_ckpt_to_keep=2", steps=12)
    assert run.checkpoints == ["global_step_11", "global_step_12", POINTER]


def test_a_checkpoint_is_written_every_so_many_steps_and_after_the_last(run_loop):
    every_two = run_loop("trainer.save_freq=2", steps=5)
    assert every_two.checkpoints == ["global_step_2", "global_step_4", "global_step_5", POINTER]
    assert run_loop(folder="only_last", steps=5).checkpoints == ["global_step_5", POINTER]


def test_a_checkpoint_that_the_pointer_names_and_is_not_there_stops_the_run(run_loop, whole):
    (whole.folder / "checkpoints" / POINTER).write_text("3000")
    with pytest.raises(CheckpointError, match="global_step_3000 cannot be read") as caught:
        run_loop(*OVERRIDES, steps=STEPS, num_val=3, folder="whole")
    assert caught.value.role == "controller"


def test_a_damaged_checkpoint_stops_the_run(run_loop, whole):
    file = whole.folder / "checkpoints" / f"global_step_{STEPS}" / "controller.json"
    file.write_text(file.read_text()[:-5])
    with pytest.raises(CheckpointError, match=f"global_step_{STEPS} cannot be read"):
        run_loop(*OVERRIDES, steps=STEPS, num_val=3, folder="whole")


def test_a_checkpoint_that_cannot_be_written_stops_the_run_with_its_step(run_loop, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file in the way")
    with pytest.raises(CheckpointError, match="global_step_1 cannot be written") as caught:
        run_loop("trainer.save_freq=1")
    assert caught.value.step == 1


def open_with(tmp_path, *overrides, may_resume=True):
    cfg = make_config(f"trainer.default_local_dir={tmp_path / 'run'}", *overrides)
    return open_run_folder(cfg, may_resume=may_resume)


def begin(folder):
    """Leave what a run leaves that logged its first step."""
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    return folder


@pytest.mark.parametrize(
    "override",
    [
        "actor.clip_ratio_high=0.3",
        "actor.ppo_mini_batch_size=4",
        "actor.optim.lr=0.5",
        "rollout.n=7",
        "rollout.temperature=0.5",
        "data.seed=3",
        "data.train_files=[a,b]",
        "model.path=other",
        "reward.on_error=zero",
        "algorithm.kl_ctrl.kl_coef=0.5",
    ],
)
def test_a_folder_of_a_run_that_computes_something_else_is_refused(tmp_path, override):
    folder = begin(open_with(tmp_path))
    before = (folder / "config.yaml").read_bytes()
    key = override.split("=")[0]
    with pytest.raises(UserError) as caught:
        open_with(tmp_path, override)
    text = str(caught.value)
    assert text.startswith(f"{key}=")
    assert f"of the run in {folder}, which this command would continue." in text
    assert "trainer.experiment_name" in text
    assert "\n" not in text
    assert (folder / "config.yaml").read_bytes() == before


def test_keys_below_an_untyped_dictionary_count_too(tmp_path):
    begin(open_with(tmp_path, "custom_reward_function.path=a.py"))
    with pytest.raises(UserError, match=r"^custom_reward_function\.path=None differs from 'a\.py'"):
        open_with(tmp_path)
    second = tmp_path / "second"
    begin(open_with(second, "data.apply_chat_template_kwargs.think=true"))
    with pytest.raises(UserError, match=r"^data\.apply_chat_template_kwargs\.think=False differs"):
        open_with(second, "data.apply_chat_template_kwargs.think=false")


@pytest.mark.parametrize(
    "override",
    [
        "trainer.n_gpus_per_node=2",
        "trainer.total_training_steps=9",
        "trainer.save_freq=3",
        "actor.megatron.expert_model_parallel_size=1",
        "actor.ppo_max_token_len_per_gpu=64",
        "data.val_files=v",
        "rollout.val_kwargs.n=2",
        "rollout.max_num_seqs=3",
        "rollout.engine_kwargs.block_size=32",
    ],
)
def test_where_and_how_long_a_run_runs_may_change(tmp_path, override):
    begin(open_with(tmp_path))
    folder = open_with(tmp_path, override)
    key, value = override.split("=")
    assert str(OmegaConf.select(OmegaConf.load(folder / "config.yaml"), key)) == value


def test_a_used_folder_is_refused_when_resuming_is_disabled(tmp_path):
    begin(open_with(tmp_path, may_resume=False))
    with pytest.raises(UserError, match=r"holds a run and trainer\.resume_mode=disable"):
        open_with(tmp_path, may_resume=False)


@pytest.mark.parametrize("may_resume", [True, False])
def test_a_run_that_failed_before_its_first_step_can_be_mended(tmp_path, may_resume):
    """Its folder holds a configuration, and what wrote it did not get far: no memory, wrong key."""
    folder = open_with(tmp_path, may_resume=may_resume)
    (folder / "metrics.jsonl").touch()
    open_with(tmp_path, "rollout.n=7", may_resume=may_resume)
    assert OmegaConf.load(folder / "config.yaml").rollout.n == 7


def test_a_checkpoint_alone_makes_a_folder_that_of_a_run(tmp_path):
    folder = open_with(tmp_path)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / POINTER).write_text("1")
    with pytest.raises(UserError, match=r"^rollout\.n=7 differs from 3"):
        open_with(tmp_path, "rollout.n=7")


def test_the_configuration_in_the_folder_is_the_resolved_one(tmp_path):
    folder = open_with(tmp_path, "trainer.project_name=p")
    text = (folder / "config.yaml").read_text()
    assert "project_name: p" in text
    assert "${" not in text
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]  # no partial file stays


def test_the_controller_s_part_of_a_checkpoint_is_readable(whole):
    file = whole.folder / "checkpoints" / "global_step_3" / "controller.json"
    state = json.loads(file.read_text())
    assert state["step"] == 3
    assert state["prompts"] == {
        "epoch": 1,
        "position": 4,
        "num_items": 10,
        "seed": 0,
        "shuffle": True,
    }
    assert state["kl"]["kl_coef"] != 0.3
