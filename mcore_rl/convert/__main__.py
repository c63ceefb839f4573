"""`mcore-rl convert DIRECTION INPUT OUTPUT`, also `python -m mcore_rl.convert ...`.

Exit code 0: converted (and verified); 1: a file could not be written, or --verify found a
difference; 2: a user's mistake. The output appears under its name when it is whole. A conversion
that was killed goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from mcore_rl.dtypes import DTYPES, torch_dtype
from mcore_rl.errors import USER_ERROR_EXIT_CODE, UserError, require
from mcore_rl.model_files import find_model
from mcore_rl.plugins import import_plugins


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    args = _parser().parse_args(argv)
    # Megatron's loader goes through parts of torch.distributed.checkpoint that torch deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    try:
        import_plugins()  # of families
        args.run(args)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(USER_ERROR_EXIT_CODE)
    except OSError as error:
        sys.stderr.write(
            f"error: {error}. Nothing was changed under {args.output}; finished files stay in "
            f"{args.output}.partial, and the same command goes on from them.\n"
        )
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mcore-rl convert", description=__doc__)
    directions = parser.add_subparsers(metavar="DIRECTION", required=True)

    to_mcore = directions.add_parser(
        "hf-to-mcore", help="Hugging Face folder to a distributed checkpoint"
    )
    to_mcore.add_argument(
        "input", help="Hugging Face folder with safetensors, or a name of the hub"
    )
    to_mcore.set_defaults(run=_hf_to_mcore)

    to_hf = directions.add_parser(
        "mcore-to-hf", help="distributed checkpoint to a Hugging Face folder"
    )
    to_hf.add_argument("input", help="what hf-to-mcore wrote, or .../checkpoints/global_step_N")
    to_hf.add_argument(
        "--config-from",
        metavar="MODEL",
        help="Hugging Face folder, or name of the hub, to take config and tokenizer from; default: "
        "the input, or model.path in the config.yaml of its run",
    )
    to_hf.add_argument(
        "--adapter",
        action="store_true",
        help="of a checkpoint of a run with LoRA write the adapters alone, as PEFT reads them; "
        "default: its base with the adapters in it",
    )
    to_hf.set_defaults(run=_mcore_to_hf)

    for direction in (to_mcore, to_hf):
        direction.add_argument("output", type=Path, help="folder to make")
        direction.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as it is")
        direction.add_argument(
            "--verify",
            action="store_true",
            help="then compare every tensor, and the logits of Megatron and transformers; "
            "needs memory for the model in float32",
        )
        direction.add_argument(
            "--prompt",
            action="append",
            default=[],
            help="text for the logits of --verify; may be repeated; default: random tokens",
        )
    return parser


def _hf_to_mcore(args: argparse.Namespace) -> None:
    _check_prompts(args)
    args.input = str(find_model(args.input, "input", download=True))
    from mcore_rl.convert.convert import hf_to_mcore

    _convert(args, hf_to_mcore)
    if args.verify:
        _verify(args, mcore=args.output, hf=args.input, written="mcore")


def _mcore_to_hf(args: argparse.Namespace) -> None:
    _check_prompts(args)
    if args.config_from is not None:
        args.config_from = find_model(
            args.config_from, "--config-from", weights=args.adapter, download=True
        )
    from mcore_rl.convert.convert import adapter_to_peft, find_checkpoint, mcore_to_hf

    if args.adapter:
        for key in ("dtype", "verify"):
            value = getattr(args, key)
            require(not value, f"--{key}", value, "has no effect with --adapter", "Leave it out.")
        adapter_to_peft(args.input, args.output, config_from=args.config_from)
        sys.stdout.write(f"{args.output}\n")
        return
    _convert(args, partial(mcore_to_hf, config_from=args.config_from))
    if args.verify:
        mcore, _ = find_checkpoint(args.input, args.config_from)
        _verify(args, mcore=mcore, hf=args.output, written="hf")


def _check_prompts(args: argparse.Namespace) -> None:
    require(args.verify or not args.prompt, "--prompt", args.prompt, "has no effect", "--verify")


def _convert(args: argparse.Namespace, convert: Callable) -> None:
    dtype = torch_dtype(args.dtype) if args.dtype else None
    with _progress_bar(args.output.name) as progress:
        convert(args.input, args.output, dtype=dtype, progress=progress)
    sys.stdout.write(f"{args.output}\n")


def _verify(args: argparse.Namespace, **where) -> None:
    from mcore_rl.convert.verify import verify

    difference = verify(prompts=args.prompt, **where)
    sys.stdout.write(f"{difference}\n")
    sys.exit(0 if difference.passed else 1)


@contextlib.contextmanager
def _progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(name), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(name, total=None)

    def show(done: int, total: int) -> None:
        bar.start()  # with the first bytes, so that a refusal stands alone
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()


if __name__ == "__main__":
    main()
