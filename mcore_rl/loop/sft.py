"""Supervised fine-tuning through the same actor: the warm start of a policy."""

from __future__ import annotations

from pathlib import Path

from mcore_rl.algorithms.objectives import SftObjective
from mcore_rl.cluster.cluster import Cluster
from mcore_rl.config.run import SftRunConfig
from mcore_rl.loop.checkpoints import Checkpoints
from mcore_rl.loop.inputs import SftInputs
from mcore_rl.loop.log import open_log
from mcore_rl.loop.step import is_due
from mcore_rl.loop.stop import Stop
from mcore_rl.metrics import merge


def train(
    cfg: SftRunConfig, inputs: SftInputs, cluster: Cluster, run_dir: Path, stop: Stop
) -> None:
    """Train to the last step or, by StoppedError, until asked to end; from the run folder's latest
    checkpoint if it has one."""
    trainer, total_steps = cfg.trainer, inputs.total_steps
    checkpoints = Checkpoints(trainer, run_dir, cluster, {"sequences": inputs.sequences})
    start = checkpoints.resume()
    with open_log(trainer, run_dir, start, total_steps) as log, stop.saves(checkpoints):
        for step in range(start, total_steps):
            cluster.enter_step(step)
            checkpoints.begin_step(step)
            stop.check()
            sequences = inputs.sequences.next(cfg.data.train_batch_size)
            checkpoints.begin_updates()
            with log.stage("train"):
                cluster.trainer.begin_step()
                metrics = cluster.trainer.update(sequences, SftObjective())
            log.log(step, merge([metrics, log.times()]))
            is_last = step + 1 == total_steps or stop.is_asked
            if is_last or is_due(step + 1, trainer.save_freq):
                with log.stage("checkpoint"):
                    checkpoints.save(step + 1)
        checkpoints.finish()
