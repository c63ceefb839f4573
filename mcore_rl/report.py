"""`mcore-rl report RUN_FOLDER [OTHER]`: write the report of a run, finished or not, or of two."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mcore_rl.errors import USER_ERROR_EXIT_CODE, UserError
from mcore_rl.observability.report.page import write_comparison, write_report


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(
        prog="mcore-rl report",
        description="Write the report of a run, or of two runs side by side, as one HTML file.",
    )
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("other", type=Path, nargs="?", help="folder of a run to lay beside it")
    arguments = parser.parse_args(argv)
    run_dir, other = arguments.run_folder, arguments.other
    try:
        file = write_report(run_dir) if other is None else write_comparison(run_dir, other)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(USER_ERROR_EXIT_CODE)
    sys.stdout.write(f"{file}\n")


if __name__ == "__main__":
    main()
