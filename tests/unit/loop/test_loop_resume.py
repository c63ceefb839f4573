"""Run folders: made, opened again by the run that they hold, refused to any other."""

from __future__ import annotations

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from mcore_rl.errors import UserError
from mcore_rl.loop.checkpoints import POINTER
from mcore_rl.run import folder as run_folder
from mcore_rl.run.folder import open_run_folder
from mcore_rl.weight_sync.base import TRANSPORTS
from tests.unit.loop.fake_workers import make_config

CUSTOM = "custom_reward_function.path=r.py"


def open_with(tmp_path, *overrides):
    cfg = make_config(*overrides, folder=tmp_path / "run")
    return open_run_folder(cfg, cfg.trainer.total_training_steps or 10)


HOLDER = """
import fcntl, os, sys
file = open(sys.argv[1], "r+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("holds it", flush=True)
sys.stdin.read()
"""


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
        "actor.megatron.dtype=bfloat16",
        "actor.megatron.moe_router_freeze=true",
        "actor.megatron.use_distributed_optimizer=false",
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
        "rollout.val_kwargs.do_sample=True",
        "rollout.max_num_seqs=3",
        "rollout.engine_kwargs.block_size=32",
    ],
)
def test_where_and_how_long_a_run_runs_may_change(tmp_path, override):
    begin(open_with(tmp_path))
    folder = open_with(tmp_path, override)
    key, value = override.split("=")
    assert str(OmegaConf.select(OmegaConf.load(folder / "config.yaml"), key)) == value


def test_the_way_that_weights_take_may_change(tmp_path, monkeypatch):
    """The engine holds the same afterwards."""
    other = TRANSPORTS.get("direct")
    monkeypatch.setattr(TRANSPORTS, "_entries", TRANSPORTS._entries | {"other": other})
    begin(open_with(tmp_path))
    open_with(tmp_path, "rollout.weight_transport=other")


def test_a_used_folder_is_refused_when_resuming_is_disabled(tmp_path):
    begin(open_with(tmp_path, "trainer.resume_mode=disable"))
    with pytest.raises(UserError, match=r"holds a run and trainer\.resume_mode=disable"):
        open_with(tmp_path, "trainer.resume_mode=disable")


@pytest.mark.parametrize("mode", ["auto", "disable"])
def test_a_run_that_failed_before_its_first_step_can_be_fixed(tmp_path, mode):
    """Its folder holds a configuration, and what wrote it did not get far: no memory, wrong key."""
    folder = open_with(tmp_path, f"trainer.resume_mode={mode}")
    (folder / "metrics.jsonl").touch()
    open_with(tmp_path, "rollout.n=7", f"trainer.resume_mode={mode}")
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
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.yaml", "run.lock"}  # no partial file stays


def test_a_path_that_is_no_checkpoint_is_refused_before_anything_is_touched(tmp_path):
    with pytest.raises(UserError, match=r"^trainer\.resume_from_path='\S+' has no controller"):
        open_with(
            tmp_path,
            "trainer.resume_mode=resume_path",
            f"trainer.resume_from_path={tmp_path}/global_step_3",
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.starts_processes
def test_a_folder_that_another_process_writes_is_refused_until_that_one_has_ended(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(run_folder, "_HOLD_WAIT_S", 1)
    (tmp_path / "run").mkdir()
    lock = tmp_path / "run" / "run.lock"
    lock.write_text("process 7 on node-3")
    command = [sys.executable, "-c", HOLDER, str(lock)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holds it\n"
        with pytest.raises(UserError, match=r"run is being written by process 7 on node-3\. Wait"):
            open_with(tmp_path)
        assert not (tmp_path / "run" / "config.yaml").exists()
        holder.kill()
    assert (open_with(tmp_path) / "config.yaml").exists()
    assert lock.read_text().startswith("process ")
    assert lock.read_text() != "process 7 on node-3"


def test_the_refusal_of_another_model_says_how_to_begin_with_this_run_s_weights(tmp_path):
    folder = begin(open_with(tmp_path))
    with pytest.raises(UserError, match=r"^model\.path='moved' differs") as caught:
        open_with(tmp_path, "model.path=moved")
    assert "resume_from_path" not in str(caught.value)  # there is nothing to begin with
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / POINTER).write_text("20")
    with pytest.raises(UserError, match=r"^model\.path='moved' differs") as caught:
        open_with(tmp_path, "model.path=moved")
    assert str(caught.value).endswith(
        "A run of another name begins with the weights of this one by trainer.resume_mode="
        f"resume_path trainer.resume_from_path={folder}/checkpoints/global_step_20"
    )


def test_another_commit_of_a_model_of_the_hub_is_refused_with_the_one_to_go_on_with(tmp_path):
    old, new = f"org/model@{'a' * 40}", f"org/model@{'b' * 40}"
    begin(open_with(tmp_path, f"model.path={old}"))
    with pytest.raises(UserError) as caught:
        open_with(tmp_path, f"model.path={new}")
    assert str(caught.value).startswith(f"model.path={new!r} differs from {old!r} of the run")
    assert str(caught.value).endswith(f"Go on with the commit that it began with: model.path={old}")
    with pytest.raises(UserError, match=r"Set trainer\.experiment_name"):
        open_with(tmp_path, f"model.path=org/other@{'a' * 40}")


def write_checkpoint(run_dir, step):
    """Leave what open_run_folder reads of a checkpoint, the latest of its run."""
    folder = run_dir / "checkpoints" / f"global_step_{step}"
    folder.mkdir(parents=True)
    (folder / "controller.json").write_text(f'{{"step": {step}}}')
    (folder.parent / POINTER).write_text(str(step))
    return folder


def from_path(folder):
    return ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={folder}"]


@pytest.mark.parametrize("step", [10, 12])
def test_another_runs_checkpoint_at_or_past_the_last_step_is_refused(tmp_path, step):
    other = write_checkpoint(tmp_path / "other", step)
    with pytest.raises(UserError) as caught:
        open_with(tmp_path, *from_path(other), "trainer.total_training_steps=10")
    assert str(caught.value).startswith(
        f"{other} is of step {step}, and the run has 10 steps: nothing is left to train. Raise "
    )
    assert not (tmp_path / "run" / "config.yaml").exists()
    open_with(tmp_path, *from_path(other), "trainer.total_training_steps=13")


def test_a_run_that_is_made_shorter_than_it_is_already_is_refused(tmp_path):
    """It would log the last weights as those of an earlier step."""
    write_checkpoint(open_with(tmp_path, "trainer.total_training_steps=10"), 10)
    open_with(tmp_path, "trainer.total_training_steps=10")
    with pytest.raises(UserError, match=r"global_step_10 is of step 10, and the run has 9 steps"):
        open_with(tmp_path, "trainer.total_training_steps=9")


def test_a_checkpoint_is_validated_whatever_its_step(tmp_path):
    other = write_checkpoint(tmp_path / "other", 12)
    validation = ["trainer.val_only=true", "data.val_files=unread"]
    open_with(tmp_path, *from_path(other), *validation, "trainer.total_training_steps=10")


@pytest.mark.parametrize(
    "override", ["actor.megatron.moe_router_freeze=true", "actor.megatron.dtype=bfloat16"]
)
def test_a_checkpoint_of_another_run_with_other_numbers_in_it_is_refused(tmp_path, override):
    other = write_checkpoint(open_with(tmp_path / "first"), 3)
    key = override.split("=")[0]
    with pytest.raises(
        UserError, match=rf"^{key}=.* differs from .* of the run that wrote {other}"
    ):
        open_with(tmp_path / "second", override, *from_path(other))
    open_with(tmp_path / "second", "actor.optim.lr=0.5", *from_path(other))


LINEAR = "actor.optim.lr_decay_style=linear"


@pytest.mark.parametrize("length", ["total_training_steps", "total_epochs"])
def test_a_decaying_schedule_does_not_become_longer_without_a_word(tmp_path, length):
    """Step 4 of 4 had a rate of 0; of 8 it has half the peak."""
    begin(open_with(tmp_path, LINEAR, f"trainer.{length}=4"))
    longer = [LINEAR, f"trainer.{length}=8"]
    with pytest.raises(UserError) as caught:
        open_with(tmp_path, *longer)
    assert str(caught.value).startswith(
        "actor.optim.lr_decay_steps=None makes the linear schedule as long as the run, and "
        f"trainer.{length} was 4 in {tmp_path / 'run'}: the learning rate would jump."
    )
    open_with(tmp_path, *longer, "actor.optim.lr_decay_steps=8")
    open_with(tmp_path, *longer)  # the word has been given


def test_a_schedule_that_does_not_depend_on_the_length_lets_it_change(tmp_path):
    begin(open_with(tmp_path, LINEAR, "actor.optim.lr_decay_steps=4"))
    open_with(tmp_path, LINEAR, "actor.optim.lr_decay_steps=4", "trainer.total_epochs=8")
    begin(open_with(tmp_path / "decided", LINEAR, "trainer.total_training_steps=4"))
    decided = [LINEAR, "trainer.total_training_steps=4", "trainer.total_epochs=8"]
    open_with(tmp_path / "decided", *decided)


def test_a_branch_with_another_length_says_what_its_schedule_is(tmp_path):
    first = open_with(tmp_path / "first", LINEAR, "trainer.total_training_steps=4")
    other = write_checkpoint(first, 2)
    longer = [LINEAR, "trainer.total_training_steps=8", *from_path(other)]
    with pytest.raises(UserError, match=r"lr_decay_steps=None .* was 4 in .*first"):
        open_with(tmp_path / "second", *longer)
    open_with(tmp_path / "second", *longer, "actor.optim.lr_decay_steps=8")


def test_a_run_folder_is_private_and_one_that_was_opened_to_others_stays_so(tmp_path):
    folder = open_with(tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o750)
    assert open_with(tmp_path).stat().st_mode & 0o777 == 0o750


def test_a_reference_to_the_environment_is_what_is_kept_and_compared(tmp_path, monkeypatch):
    """A key may be another one when the run goes on; a setting that refers to another may not."""
    setting = "custom_reward_function.reward_kwargs.key"
    monkeypatch.setenv("KEY", "sk-0123456789")
    folder = begin(open_with(tmp_path, CUSTOM, f"{setting}=${{oc.env:KEY}}"))
    assert "sk-0123456789" not in (folder / "config.yaml").read_text()
    monkeypatch.setenv("KEY", "sk-other-key")
    open_with(tmp_path, CUSTOM, f"{setting}=${{oc.env:KEY}}")
    monkeypatch.setenv("OTHER", "sk-0123456789")
    with pytest.raises(
        UserError, match=r"key='\$\{oc.env:OTHER\}' differs from '\$\{oc.env:KEY\}'"
    ):
        open_with(tmp_path, CUSTOM, f"{setting}=${{oc.env:OTHER}}")


def test_a_damaged_configuration_of_a_run_is_one_line(tmp_path):
    folder = begin(open_with(tmp_path))
    (folder / "config.yaml").write_text("[" * 10**4)
    with pytest.raises(UserError, match=r"config\.yaml is not the configuration of a run"):
        open_with(tmp_path)
