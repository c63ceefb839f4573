"""`mcore-rl plan ...` is `mcore-rl train ... trainer.dry_run=true`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mcore_rl.train import main as train_main


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    train_main([*(sys.argv[1:] if argv is None else argv), "trainer.dry_run=true"])


if __name__ == "__main__":
    main()
