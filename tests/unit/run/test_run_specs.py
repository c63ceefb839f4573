"""What workers are built from follows from the configuration."""

from __future__ import annotations

import logging
from typing import Any, cast

import pytest

from mcore_rl.config.compose import compose_config, parse_command_line
from mcore_rl.config.run import RunConfig, SftRunConfig
from mcore_rl.launch.group import ChannelWorkers
from mcore_rl.run.specs import start_cluster
from mcore_rl.types import Offloads, Part


class Started:
    """Workers that keep what they were started with."""

    world_size = 1
    spec: Any = None

    def start(self, spec, engines, logs):
        self.spec = spec


@pytest.fixture
def worker_spec(tmp_path, monkeypatch):
    """Return the specification that a configuration starts workers with; the controller's log file
    goes into `tmp_path`."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [*logging.getLogger().handlers])

    def started_with(root, *overrides):
        folder = f"trainer.default_local_dir={tmp_path}"
        argv = ["model.path=m", "data.train_files=d", folder, *overrides]
        cfg = compose_config(root, parse_command_line("train", "", argv))
        workers = cast(ChannelWorkers, Started())
        start_cluster(cfg, workers, total_steps=3, temperature=1.0, engine=None)
        return cast(Started, workers).spec

    return started_with


@pytest.mark.parametrize(
    ("overrides", "is_kept"),
    [
        ([], False),
        (["actor.use_kl_loss=true"], True),
        (["algorithm.use_kl_in_reward=true"], True),
        (["actor.use_kl_loss=true", "model.lora_rank=8"], False),  # the weights themselves are it
    ],
)
def test_a_copy_of_the_first_weights_is_kept_where_a_kl_is_computed(
    worker_spec, overrides, is_kept
):
    assert worker_spec(RunConfig, *overrides).actor.with_reference == is_kept


def test_fine_tuning_keeps_no_copy_of_the_first_weights(worker_spec):
    assert not worker_spec(SftRunConfig).actor.with_reference


def test_workers_are_told_what_leaves_the_device(worker_spec):
    offloads = ["actor.megatron.grad_offload=true", "ref.megatron.param_offload=true"]
    found = worker_spec(RunConfig, *offloads, "actor.use_kl_loss=true").offloads
    assert found == Offloads(actor=frozenset({Part.GRAD, Part.REFERENCE}))
    found = worker_spec(SftRunConfig, "actor.megatron.optimizer_offload=true").offloads
    assert found == Offloads(actor=frozenset({Part.OPTIMIZER}))


def test_a_reference_that_is_not_kept_cannot_be_offloaded_which_is_said_once(worker_spec, caplog):
    found = worker_spec(RunConfig, "ref.megatron.param_offload=true").offloads
    assert found.actor == frozenset()
    assert [record.getMessage() for record in caplog.records] == [
        "not read here: ref.megatron.param_offload (no frozen copy is kept)"
    ]
