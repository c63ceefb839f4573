"""Log lines of every process: one format with role and rank, on stderr.

INFO on rank 0, WARNING elsewhere, so that a run of many processes reads like one. Says nothing
about metrics, which go through `trackers`. vLLM configures its own logger when it is imported and
takes its level from VLLM_LOGGING_LEVEL, so whoever starts an engine sets that.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from mcore_rl.printable import printable

QUIETED_LOGGERS = {
    "megatron.core": "prints whole configs, and every parameter of every gradient bucket, at INFO",
    "httpx": "one INFO line per request, so one per sample with a remote reward or engine",
    "matplotlib": "font cache messages at INFO while the report is drawn",
}
"""Loggers held at WARNING, each with the reason."""


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
    level = logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for name in QUIETED_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
