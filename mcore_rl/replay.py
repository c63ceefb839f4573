"""`mcore-rl replay RUN`: train again from a run's journal, without an engine, and compare.

mcore-rl replay outputs/run                          equal, bit by bit, or where it parts
mcore-rl replay outputs/run actor.clip_ratio_low=0.3 what another setting would have changed first
mcore-rl replay outputs/run --against outputs/other  compare with another run of the same samples
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mcore_rl.config.checks import check_run
from mcore_rl.config.compose import CommandLine, parse_overrides
from mcore_rl.config.run import RunConfig
from mcore_rl.errors import StoppedError, UserError
from mcore_rl.launch.ending import end_process
from mcore_rl.launch.group import ChannelWorkers
from mcore_rl.observability.run_folder import CONFIG_FILE, JOURNAL, read_config, value_of
from mcore_rl.run.command import run_command
from mcore_rl.run.specs import placement_of_trainers, start_run

if TYPE_CHECKING:
    from mcore_rl.loop.stop import Stop

_OTHERWISE = (
    "trainer.save_freq=-1",
    "trainer.max_ckpt_to_keep=null",
    "trainer.best_ckpt_metric=null",
    "trainer.export_hf_model=false",
    "trainer.logger=[console]",
    "trainer.journal=true",
    "trainer.launcher=auto",
    "rollout.compare_loaded_weights=false",
)
"""Settings that a replay changes: no number depends on them."""
_FROM_THE_START = ("trainer.resume_mode=auto", "trainer.resume_from_path=null")
DIFFERS = 1
"""Exit code."""


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="mcore-rl replay",
        description="Train again from a run's journal, without an engine, and compare the metrics "
        "and the weights of every step, bit by bit.",
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--against", type=Path, help="folder of a run to compare with; RUN")
    parser.add_argument("--out", type=Path, help="new folder of the replay; RUN/replays/<n>")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(list(argv))


def command_line(run: Path, out: Path, overrides: Sequence[str]) -> CommandLine:
    """Return the command line of a replay.

    Args:
        run: folder of the run.
        out: of the replay.
        overrides: `key=value`, of settings that differ from the run's.

    Raises:
        UserError: if the folder has no configuration, or an override is none.
    """
    recipe = read_config(run / CONFIG_FILE)
    begun = value_of(recipe, "trainer.resume_from_path")
    is_own = begun is not None and Path(begun).resolve().is_relative_to(run.resolve())
    from_the_start = _FROM_THE_START if begun is None or is_own else ()
    options = [*_OTHERWISE, *from_the_start, f"trainer.default_local_dir='{out}'", *overrides]
    assignments, warning = parse_overrides(options)
    return CommandLine("replay", run, assignments, warning, show=False, recipe=recipe)


def run(cfg: RunConfig, workers: ChannelWorkers, source: Path) -> Path:
    """Train as the run in `source` did, into the folder that `cfg` names; return it."""
    from mcore_rl.loop.stop import stopped_by_signal

    with stopped_by_signal(workers) as stop:
        _run(cfg, workers, source, stop)
    return Path(cfg.trainer.default_local_dir)


def _run(cfg: RunConfig, workers: ChannelWorkers, source: Path, stop: Stop) -> None:
    from mcore_rl.data.chat import decode_response, load_tokenizer
    from mcore_rl.loop.loops import LOOPS
    from mcore_rl.loop.recorded import Journal, recorded
    from mcore_rl.loop.replayed import Playback, replayed
    from mcore_rl.run.folder import open_run_folder
    from mcore_rl.run.inputs import load_run_inputs

    playback = Playback(source / JOURNAL)
    inputs = load_run_inputs(cfg)
    tokenizer = load_tokenizer(cfg.model.folder)
    run_dir = open_run_folder(cfg, inputs.total_steps)
    cluster = start_run(cfg, workers, inputs, run_dir, placement_of_trainers(cfg))
    cluster, inputs = replayed(
        cluster,
        inputs,
        playback,
        decode=lambda ids: decode_response(tokenizer, ids.tolist()),
        at_end=stop.ask,
    )
    journal = Journal(run_dir / JOURNAL)
    cluster, inputs = recorded(cluster, inputs, journal)
    with contextlib.suppress(StoppedError):  # where the journal ends
        LOOPS[cfg.trainer.loop](cfg, inputs, cluster, run_dir, stop)
        journal.close()
    cluster.close()


def report(out: Path, against: Path) -> int:
    """Print where the replay and a run begin to differ; return the exit code.

    Raises:
        UserError: if they cannot be compared.
    """
    from mcore_rl.loop.difference import compare

    found = compare(out, against)
    for line in filter(None, (found.metric, found.tensor)):
        sys.stdout.write(f"differs {line}\n")
    if found.is_equal:
        sys.stdout.write(
            f"equal   {found.num_steps} steps: {found.num_numbers} numbers of metrics and "
            f"{found.num_tensors} tensors, bit by bit\n"
        )
    return 0 if found.is_equal else DIFFERS


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    args = arguments(sys.argv[1:] if argv is None else argv)
    out = args.out or _free(args.run / "replays")
    replayed: list[Path] = []  # empty in other processes than the controller
    run_command(
        "mcore_rl.replay",
        "Train again from a run's journal.",
        args.overrides,
        RunConfig,
        check_run,
        lambda cfg, workers: replayed.append(run(cfg, workers, args.run)),
        parse=lambda _program, _description, options: command_line(args.run, out, options),
        place=placement_of_trainers,
    )
    try:
        codes = [report(folder, args.against or args.run) for folder in replayed]
    except UserError as error:
        end_process(error)
    sys.exit(max(codes, default=0))


def _free(folder: Path) -> Path:
    """Return the first of the subfolders 1, 2, 3 ... that does not exist."""
    return next(path for n in itertools.count(1) if not (path := folder / str(n)).exists())


if __name__ == "__main__":
    main()
