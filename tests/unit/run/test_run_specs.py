"""What workers are built from follows from the configuration."""

from __future__ import annotations

from typing import Any, cast

import pytest

from mcore_rl.config.compose import compose_config, parse_command_line
from mcore_rl.config.run import RunConfig, SftRunConfig
from mcore_rl.launch.group import ChannelWorkers
from mcore_rl.run.specs import start_cluster


class Started:
    """Workers that keep what they were started with."""

    world_size = 1
    spec: Any = None

    def start(self, spec):
        self.spec = spec


def actor_spec(root, *overrides):
    argv = ["model.path=m", "data.train_files=d", *overrides]
    cfg = compose_config(root, parse_command_line("train", "", argv))
    workers = Started()
    start_cluster(cfg, cast(ChannelWorkers, workers), total_steps=3, temperature=1.0, engine=None)
    return workers.spec.actor


@pytest.mark.parametrize(
    ("overrides", "is_kept"),
    [
        ([], False),
        (["actor.use_kl_loss=true"], True),
        (["algorithm.use_kl_in_reward=true"], True),
        (["actor.use_kl_loss=true", "model.lora_rank=8"], False),  # the weights themselves are it
    ],
)
def test_a_copy_of_the_first_weights_is_kept_where_a_kl_is_computed(overrides, is_kept):
    assert actor_spec(RunConfig, *overrides).with_reference == is_kept


def test_fine_tuning_keeps_no_copy_of_the_first_weights():
    assert not actor_spec(SftRunConfig).with_reference
