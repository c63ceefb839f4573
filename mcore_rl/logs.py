"""`mcore-rl logs RUN_FOLDER`: what all processes of a run have logged, as one text by time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mcore_rl.errors import USER_ERROR_EXIT_CODE, UserError
from mcore_rl.observability.log_view import merged_lines


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(
        prog="mcore-rl logs", description="Show the log lines of all processes of a run, by time."
    )
    parser.add_argument("run_folder", type=Path)
    try:
        for line in merged_lines(parser.parse_args(argv).run_folder):
            sys.stdout.write(f"{line}\n")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(USER_ERROR_EXIT_CODE)


if __name__ == "__main__":
    main()
