"""`mcore-rl verify CHECK ...`, also `python -m mcore_rl.verify CHECK ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mcore_rl.errors import USER_ERROR_EXIT_CODE, UserError, require
from mcore_rl.launch.torchrun import is_launched
from mcore_rl.plugins import import_plugins
from mcore_rl.verify import layouts, model

CHECKS = (model, layouts)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command; exit code 0: passed, 1: not, 2: a user's mistake."""
    parser = argparse.ArgumentParser(prog="mcore-rl verify", description=__doc__)
    parsers = parser.add_subparsers(metavar="CHECK", required=True)
    for check in CHECKS:
        check.add_parser(parsers)
    args = parser.parse_args(argv)
    try:
        import_plugins()  # of families and losses
        require(not is_launched(), "torchrun", "yes", "is not used here", "Start one process.")
        sys.exit(args.run(args))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(USER_ERROR_EXIT_CODE)


if __name__ == "__main__":
    main()
