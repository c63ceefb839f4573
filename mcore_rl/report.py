"""`mcore-rl report RUN_FOLDER`: write the report of a run, finished or not, again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mcore_rl.errors import USER_ERROR_EXIT_CODE, UserError
from mcore_rl.observability.report import write_report


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(
        prog="mcore-rl report", description="Write the report of a run again."
    )
    parser.add_argument("run_folder", type=Path)
    try:
        sys.stdout.write(f"{write_report(parser.parse_args(argv).run_folder)}\n")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(USER_ERROR_EXIT_CODE)


if __name__ == "__main__":
    main()
