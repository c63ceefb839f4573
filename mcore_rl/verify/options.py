"""What all checks of `mcore-rl verify` are told: the model, their limits and where numbers go."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mcore_rl.data.vocabulary import check_tokenizer
from mcore_rl.errors import require
from mcore_rl.model_files import find_model
from mcore_rl.models.spec import check_weights, load_hf_config


def new_parser(
    parsers: Any, name: str, summary: str, doc: str | None, run: Callable[..., int]
) -> argparse.ArgumentParser:
    """Return the parser of a check, with --model, added to those of `mcore-rl verify`.

    Args:
        parsers: of `mcore-rl verify`.
        name: of the check.
        summary: of one line, in the list of checks.
        doc: of the check's module.
        run: takes the arguments, runs the check and returns the exit code.
    """
    parser = parsers.add_parser(
        name,
        help=summary,
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    help_of_model = "model folder, or a name of the Hugging Face hub"
    parser.add_argument("--model", required=True, type=Path, help=help_of_model)
    parser.set_defaults(run=run)
    return parser


def add_limits(
    parser: argparse.ArgumentParser, *, seed_of: str, layout: str, timed: str, written: str
) -> None:
    """Add --seed, --max-processes, --timeout and --json; the words complete their help."""
    add = parser.add_argument
    add("--seed", type=int, default=0, help=f"of {seed_of}")
    add("--max-processes", type=int, help=f"of {layout}; default: GPUs, or cores and at least 4")
    add("--timeout", type=float, default=1800, help=f"seconds that {timed} may take")
    add("--json", type=Path, help=f"write {written} into this file")


def check_json(args: argparse.Namespace) -> None:
    """Raise a UserError unless the file of --json has a folder."""
    folder = args.json and args.json.absolute().parent
    require(not folder or folder.is_dir(), "--json", str(args.json), "is in no existing folder")


def find_whole_model(args: argparse.Namespace) -> Any:
    """Put the folder of the model into `args.model` and return its Hugging Face configuration.

    Raises:
        UserError: if it cannot be found, or its weights or tokenizer do not fit.
    """
    args.model = find_model(args.model, "--model", download=True)
    hf_config = load_hf_config(args.model, "--model")
    check_weights(args.model, hf_config)
    check_tokenizer(args.model, hf_config.vocab_size)
    return hf_config
