"""The console script `mcore-rl`, also `python -m mcore_rl.cli`; `mcore-rl train ...` is
`python -m mcore_rl.train ...`."""

from __future__ import annotations

import importlib
import sys

from mcore_rl.errors import USER_ERROR_EXIT_CODE, closest_hint

COMMANDS: dict[str, tuple[str, ...]] = {
    "train": ("mcore_rl.train",),
    "sft": ("mcore_rl.sft",),
    "eval": ("mcore_rl.eval",),
    "replay": ("mcore_rl.replay",),
    "plan": ("mcore_rl.plan.__main__",),
    "convert": ("mcore_rl.convert.__main__",),
    "report": ("mcore_rl.report",),
    "logs": ("mcore_rl.logs",),
    "verify": ("mcore_rl.verify.__main__",),
    "doctor": ("mcore_rl.doctor.__main__",),
}
"""Module of each command, and its fixed arguments."""


def main() -> None:
    """Run the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        sys.stdout.write(f"usage: mcore-rl {{{','.join(COMMANDS)}}} [--help] [key=value ...]\n")
        return
    if name not in COMMANDS:
        sys.stderr.write(f"error: {name!r} is not a command.{closest_hint(name, COMMANDS)}\n")
        sys.exit(USER_ERROR_EXIT_CODE)
    module, *arguments = COMMANDS[name]
    importlib.import_module(module).main([*sys.argv[2:], *arguments])


if __name__ == "__main__":
    main()
