"""The log of a run as its loop uses it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mcore_rl.config.run import TrainerConfig
from mcore_rl.observability.trackers import RunLog


@contextlib.contextmanager
def open_log(
    trainer: TrainerConfig, run_dir: Path, start_step: int, total_steps: int
) -> Iterator[RunLog]:
    """Open the trackers that `trainer.logger` names, and close them whatever happens."""
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
