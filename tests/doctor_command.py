"""The doctor in a process of its own, on installations and machines that are not as they should be:
packages that stand in for real ones come first on its path, and what belongs to a machine is put
in its place in name spaces of the kernel."""

import functools
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT_S = 240
IN_SPACES = ["unshare", "--user", "--map-root-user", "--mount"]
"""A command that begins so has mounts of its own."""
_STEERING = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MASTER_PORT", "RANK")
_PLAIN = {name: value for name, value in os.environ.items() if name not in _STEERING}


@dataclass(frozen=True)
class Found:
    """What the command said."""

    exit_code: int
    rows: dict[str, dict[str, str]]
    """By name: the fields of `doctor.rows.Row`."""

    def statuses(self) -> dict[str, str]:
        return {name: row["status"] for name, row in self.rows.items()}


def environment(*folders: Path, **variables: str) -> dict[str, str]:
    """Return the environment in which these folders come first on Python's path."""
    path = os.pathsep.join(map(str, [*folders, ROOT]))
    return _PLAIN | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | variables


def doctor(
    *argv: str | Path, path: tuple[Path, ...] = (), before: str = "", python: str = "", **variables
) -> Found:
    """Run the command.

    Args:
        argv: of it.
        path: folders that come first on Python's path.
        before: lines of a shell that runs it afterwards, in name spaces of its own if they mount.
        python: options of the interpreter.
        variables: of the environment.
    """
    words = [sys.executable, *python.split(), "-m", "mcore_rl.cli", "doctor", "--json"]
    line = f"{before}\nexec {shlex.join([*words, *map(str, argv)])}"
    spaces = IN_SPACES if "mount " in before else []
    done = subprocess.run(
        [*spaces, "bash", "-e", "-c", line],
        env=environment(*path, **variables),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode in (0, 1), done.stderr
    said = json.loads(done.stdout)
    assert said["healthy"] == (done.returncode == 0)
    return Found(done.returncode, {row["name"]: row for row in said["rows"]})


def package(
    folder: Path, name: str, version: str, source: str | None = "", requires: tuple[str, ...] = ()
) -> Path:
    """Write a distribution, and its module unless `source` is None, into a folder; return that."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {one}" for one in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    if source is not None:
        module = folder / name.replace("-", "_")
        module.mkdir()
        (module / "__init__.py").write_text(source)
    return folder


def without(folder: Path, *names: str) -> Path:
    """Fill a folder with links to what is installed, but for what begins with one of the names;
    the interpreter with `-S` finds nothing else."""
    folder.mkdir()
    for entry in Path(pytest.__file__).parents[1].iterdir():
        if not entry.name.startswith(names):
            (folder / entry.name).symlink_to(entry)
    return folder


@functools.cache
def can_mount() -> bool:
    """Whether this system lets a process have mounts of its own."""
    command = [*IN_SPACES, "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True, timeout=LIMIT_S).returncode == 0
    except FileNotFoundError:
        return False


needs_mounts = pytest.mark.skipif(
    not can_mount(), reason="this system lets no process have mounts of its own"
)
