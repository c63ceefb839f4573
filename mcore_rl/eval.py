"""`mcore-rl eval`: a model, or a checkpoint of a run, against data sets, and nothing else.

mcore-rl eval model.path=... data.val_files=test.parquet
mcore-rl eval model.path=... data.val_files=test.parquet \\
    trainer.resume_mode=resume_path trainer.resume_from_path=runs/x/checkpoints/global_step_20

It is the training command with `trainer.val_only=true`, without what only training needs: the
engines get the weights from the actor, as in every run, and are checked against it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mcore_rl.config.checks import check_eval
from mcore_rl.config.run import RunConfig
from mcore_rl.run.command import run_command
from mcore_rl.train import run

OWN_FOLDER = "trainer.experiment_name=eval"
VAL_ONLY = "trainer.val_only=true"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    given = sys.argv[1:] if argv is None else argv
    run_command(
        "mcore_rl.eval",
        "Evaluate a model, or a checkpoint of a run, on data.val_files.",
        [OWN_FOLDER, *given, VAL_ONLY],
        RunConfig,
        check_eval,
        run,
        engine=lambda cfg: cfg.rollout.name,
    )


if __name__ == "__main__":
    main()
