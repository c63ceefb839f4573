"""The log of a run as its loop uses it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.cluster.memory import peak_metrics
from mcore_rl.config.run import TrainerConfig
from mcore_rl.metrics import Metrics, maximum, mean, total
from mcore_rl.observability.trackers import RunLog


@contextlib.contextmanager
def open_log(
    trainer: TrainerConfig, run_dir: Path, start_step: int, total_steps: int
) -> Iterator[RunLog]:
    """Open the trackers that `trainer.logger` names, and always close them."""
    log = RunLog(
        run_dir,
        trainer.logger,
        total_steps,
        start_step,
        trainer.project_name,
        trainer.experiment_name,
    )
    with contextlib.closing(log):
        yield log


def performance(cluster: Cluster) -> Metrics:
    """Return how busy the engines were and how much memory the train workers held since the last
    call, the number of engines, and the number of engine restarts so far."""
    engines = cluster.engines
    found = {
        "perf/engines_busy_frac": mean(engines.busy_share()),
        "perf/engines": maximum(float(engines.num_engines)),
        "perf/engine_restarts": maximum(float(engines.num_restarts)),
    }
    return found | peak_metrics(cluster.workers)


_OF_THE_TRAINER = ("old_logprobs", "values", "train_critic", "train")
"""Stages in which the train workers compute."""


def with_times(metrics: Metrics, times: Metrics) -> Metrics:
    """Return the metrics of a step with its times, the trained tokens per second of the step, and
    the share of the step in which the train workers computed."""
    tokens = metrics.get("batch/tokens", total(0.0))  # absent while only the critic trains
    seconds = times["time/step"].value
    stages = [times.get(f"time/{stage}", total(0.0)).value for stage in _OF_THE_TRAINER]
    return {
        **metrics,
        **times,
        "perf/tokens_per_s": mean(tokens.value / seconds),
        "perf/trainer_busy_frac": mean(sum(stages) / seconds),
    }
