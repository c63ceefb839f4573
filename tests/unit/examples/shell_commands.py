"""What a shell script asks for: it runs with stand-ins for the programs that it starts."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mcore_rl.config.checks import check_run
from mcore_rl.config.compose import compose_config, parse_command_line
from mcore_rl.config.run import RunConfig

# Writes its name and arguments, one per line, as one command.
STAND_IN = '#!/bin/sh\n{ printf "%s\\n" "${0##*/}" "$@"; echo; } >> "$COMMANDS"\n'


@dataclass(frozen=True)
class Ended:
    """How a script ended and which commands it ran."""

    exit_code: int
    stderr: str
    stdout: str
    commands: list[list[str]]


def run_script(
    tmp_path: Path,
    script: Path,
    *argv: str,
    stand_ins: str,
    folder: Path | None = None,
    **variables: str,
) -> Ended:
    """Run the script in a folder with stand-ins for the named programs and these environment
    variables."""
    programs, record = tmp_path / "bin", tmp_path / "commands"
    programs.mkdir(exist_ok=True)
    record.write_text("")
    for name in stand_ins.split():
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(script), *argv],
        env=os.environ | {"PATH": path, "COMMANDS": str(record)} | variables,
        cwd=folder or tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    commands = [block.split("\n") for block in record.read_text().split("\n\n") if block]
    return Ended(done.returncode, done.stderr, done.stdout, commands)


def composed(command: list[str]) -> RunConfig:
    """Return the checked configuration of a command `... -m mcore_rl.train ...`."""
    argv = command[command.index("mcore_rl.train") + 1 :]
    assert command[command.index("mcore_rl.train") - 1] == "-m"
    config = compose_config(RunConfig, parse_command_line("train", "", argv))
    check_run(config)
    return config
