"""`python -m mcore_rl.train`: reinforcement learning from a configuration.

python -m mcore_rl.train --config-name gmpo model.path=... data.train_files=train.parquet
torchrun --nproc-per-node 8 -m mcore_rl.train --config-name gmpo ...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mcore_rl.config.checks import check_run
from mcore_rl.config.run import RunConfig
from mcore_rl.launch.group import ChannelWorkers
from mcore_rl.run.command import run_command
from mcore_rl.run.export import export_model
from mcore_rl.run.specs import placement_of, start_run

if TYPE_CHECKING:
    from mcore_rl.loop.stop import Stop


def run(cfg: RunConfig, workers: ChannelWorkers) -> None:
    """Read the inputs, start the workers, train, export the model and write the report; end before
    if SIGUSR1 asks for it."""
    from mcore_rl.loop.stop import stopped_by_signal

    with stopped_by_signal(workers) as stop:
        _run(cfg, workers, stop)


def _run(cfg: RunConfig, workers: ChannelWorkers, stop: Stop) -> None:
    from mcore_rl.cluster.memory import measured
    from mcore_rl.loop.loops import LOOPS
    from mcore_rl.loop.recorded import Journal, recorded
    from mcore_rl.loop.validate import validate
    from mcore_rl.observability.report.page import write_report
    from mcore_rl.observability.results import results_table
    from mcore_rl.observability.run_folder import JOURNAL
    from mcore_rl.plan.measured import write_memory
    from mcore_rl.run.folder import open_run_folder
    from mcore_rl.run.inputs import load_run_inputs

    inputs = load_run_inputs(cfg)
    run_dir = open_run_folder(cfg, inputs.total_steps)
    cluster = start_run(cfg, workers, inputs, run_dir, placement_of(cfg))
    stop.interrupts(cluster.interrupt, inputs.scorer.interrupt)
    if cfg.trainer.val_only:
        folder = validate(cfg, inputs, cluster, run_dir)
        cluster.close()
        sys.stdout.write(results_table(folder))
        return
    journal = Journal(run_dir / JOURNAL) if cfg.trainer.journal else None
    if journal:
        cluster, inputs = recorded(cluster, inputs, journal)
    LOOPS[cfg.trainer.loop](cfg, inputs, cluster, run_dir, stop)
    if journal:
        journal.close()
    if cfg.trainer.export_hf_model:
        export_model(cluster, run_dir)
    prompts = inputs.prompts.peek(len(inputs.prompts))
    prompt_tokens = [len(prompt.token_ids) for prompt in prompts]
    write_memory(cfg, prompt_tokens, measured(cluster.workers), run_dir)
    cluster.close()
    sys.stdout.write(f"report  {write_report(run_dir)}\n")


def plan(cfg: RunConfig) -> None:
    """Print what the run would do."""
    from mcore_rl.plan.report import write_plan

    write_plan(cfg)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    run_command(
        "mcore_rl.train",
        "Train a policy by reinforcement learning.",
        sys.argv[1:] if argv is None else argv,
        RunConfig,
        check_run,
        run,
        plan,
        engine=lambda cfg: cfg.rollout.name,
    )


if __name__ == "__main__":
    main()
