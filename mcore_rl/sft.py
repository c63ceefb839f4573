"""`python -m mcore_rl.sft`: supervised fine-tuning with the same actor and configuration."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mcore_rl.config.checks import check_sft
from mcore_rl.config.run import SftRunConfig
from mcore_rl.launch.group import ChannelWorkers
from mcore_rl.run.command import run_command
from mcore_rl.run.export import export_model
from mcore_rl.run.specs import start_cluster

if TYPE_CHECKING:
    from mcore_rl.loop.stop import Stop


def run(cfg: SftRunConfig, workers: ChannelWorkers) -> None:
    """Read the inputs, start the workers, train and export the model; end before if SIGUSR1 asks
    for it."""
    from mcore_rl.loop.stop import stopped_by_signal

    with stopped_by_signal(workers) as stop:
        _run(cfg, workers, stop)


def _run(cfg: SftRunConfig, workers: ChannelWorkers, stop: Stop) -> None:
    from mcore_rl.loop.sft import train
    from mcore_rl.run.folder import open_run_folder
    from mcore_rl.run.inputs import load_sft_inputs

    inputs = load_sft_inputs(cfg)
    run_dir = open_run_folder(cfg, inputs.total_steps)
    cluster = start_cluster(
        cfg,
        workers,
        total_steps=inputs.total_steps,
        temperature=1.0,
        engine=None,
    )
    train(cfg, inputs, cluster, run_dir, stop)
    if cfg.trainer.export_hf_model:
        export_model(cluster, run_dir)
    cluster.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    run_command(
        "mcore_rl.sft",
        "Fine-tune a model on prompts with given responses.",
        sys.argv[1:] if argv is None else argv,
        SftRunConfig,
        check_sft,
        run,
    )


if __name__ == "__main__":
    main()
