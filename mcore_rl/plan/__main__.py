"""`mcore-rl plan`: what a run would do; with `--suggest`, which layouts it could have.

mcore-rl plan --config-name grpo model.path=... data.train_files=...
mcore-rl plan --suggest --config-name grpo trainer.nnodes=8 trainer.n_gpus_per_node=8 ...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import NoReturn

from mcore_rl import train
from mcore_rl.config.compose import compose_config, parse_command_line
from mcore_rl.config.run import RunConfig, with_fetched_models
from mcore_rl.errors import USER_ERROR_EXIT_CODE, UserError, require
from mcore_rl.launch.libraries import quiet_libraries
from mcore_rl.observability.log_setup import setup_logging

DRY_RUN = "trainer.dry_run=true"
_HELP = {
    "tflops": "dense bfloat16 TFLOP/s of a device",
    "memory_tb_s": "TB/s of its memory",
    "link_gb_s": "GB/s to devices of its node, one way",
    "network_gb_s": "GB/s to other nodes, for each device",
    "host_gb_s": "GB/s to host memory",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See mcore-rl plan --help.")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    given = sys.argv[1:] if argv is None else list(argv)
    if not any(name.startswith("--suggest") for name in given):
        train.main([*given, DRY_RUN])
        return
    try:
        _suggest(given)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(USER_ERROR_EXIT_CODE)


def _suggest(argv: Sequence[str]) -> None:
    from mcore_rl.plan.step_time import Speeds
    from mcore_rl.plan.suggest_report import write_suggestions

    parser = _Parser(
        prog="mcore-rl plan --suggest",
        description="Layouts and placements that fit, fastest first. Devices are "
        "trainer.nnodes (and rollout.nnodes) of trainer.n_gpus_per_node, of "
        "trainer.device_memory_gib. Keys set here stay as they are; those of a recipe that say "
        "how a run is laid out are looked for.",
    )
    parser.add_argument("--suggest", action="store_true", required=True)
    parser.add_argument("--top", type=int, default=10, help="how many are shown")
    for field in fields(Speeds):
        option = f"--{field.name.replace('_', '-')}"
        help_text = f"{_HELP[field.name]} (%(default)s)"
        parser.add_argument(option, type=float, default=field.default, help=help_text)
    args, rest = parser.parse_known_args(argv)
    require(args.top >= 1, "--top", args.top, "must be at least 1")
    for field in fields(Speeds):
        value = getattr(args, field.name)
        require(value > 0, f"--{field.name.replace('_', '-')}", value, "must be > 0")
    speeds = Speeds(**{field.name: getattr(args, field.name) for field in fields(Speeds)})

    line = parse_command_line("mcore-rl plan", "", [*rest, DRY_RUN])
    cfg = compose_config(RunConfig, line)
    quiet_libraries()
    setup_logging(0, "controller")
    write_suggestions(
        with_fetched_models(cfg), [option.key for option in line.overrides], speeds, args.top
    )


if __name__ == "__main__":
    main()
