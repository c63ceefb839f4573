"""Log lines of every process: one format with role and rank, on stderr and in a file of its own.

On stderr INFO on rank 0, WARNING elsewhere, so that a run of many processes reads like one; INFO in
every file. `mcore-rl logs` shows the files as one, by time. Says nothing
about metrics, which go through `trackers`. vLLM configures its own logger when it is imported and
takes its level from VLLM_LOGGING_LEVEL, so whoever starts an engine sets that.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TextIO

from mcore_rl.printable import printable

QUIETED_LOGGERS = {
    "megatron.core": "prints whole configs, and every parameter of every gradient bucket, at INFO",
    "httpx": "one INFO line per request, so one per sample with a remote reward or engine",
}
"""Loggers set to WARNING, each with the reason."""


class _StderrHandler(logging.StreamHandler):
    """Looks stderr up at each line: a live progress line replaces it while it is on screen."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


class _PrintableFormatter(logging.Formatter):
    """Texts of models, data and rewards stand in log lines too."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def setup_logging(rank: int, role: str) -> None:
    """Configure the root logger of this process; a second call replaces the first.

    Args:
        rank: global rank; 0 logs INFO, the others WARNING.
        role: "controller", "actor", "rollout", ...
    """
    handler = _StderrHandler()
    line = f"%(asctime)s %(levelname)s [{role} {rank}] %(name)s: %(message)s"
    handler.setFormatter(_PrintableFormatter(line, datefmt="%H:%M:%S"))
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    for name in QUIETED_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


def log_to_file(folder: Path, rank: int, role: str) -> None:
    """Also write this process's lines from now on into a file of a folder, after the lines of an
    earlier run.

    Args:
        folder: `logs` of the run folder; made if it does not exist.
        rank: as in `setup_logging`.
        role: as in `setup_logging`.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = folder / f"{role}-{rank}.log"
    os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))  # it holds texts of the data
    handler = logging.FileHandler(file)
    line = f"%(asctime)s.%(msecs)03d %(levelname)s [{role} {rank}] %(name)s: %(message)s"
    handler.setFormatter(_PrintableFormatter(line, datefmt="%Y-%m-%dT%H:%M:%S"))
    logging.getLogger().addHandler(handler)
