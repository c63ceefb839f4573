"""The files of a run folder that a person or a report reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mcore_rl.errors import UserError

CONFIG_FILE = "config.yaml"
"""The configuration, with references to the environment; written before the first step."""

METRICS_FILE = "metrics.jsonl"
"""One object per step: {"step": 0, "reward/mean": 0.5, ...}."""

SAMPLES_FILE = "samples.jsonl"
"""A few samples per step."""

LOGS = "logs"
"""Folder: the log lines of each process, "worker-3.log"."""

JOURNAL = "journal"
"""Folder: the answers of the engines and of the rewards, one file per step."""

MEMORY_FILE = "memory.json"
"""The workers' memory next to the plan's estimate; written after the last step."""

REPORT_FILE = "report.html"
"""Made from the others."""


def read_config(file: Path) -> dict[str, Any]:
    """Return a configuration as it is written: no reference in it is followed, since the folder may
    be a stranger's, and what a reference stands for is in this process's environment.

    Raises:
        UserError: if it is not one.
    """
    try:
        found = OmegaConf.to_container(OmegaConf.load(file))
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} is not the configuration of a run: {reason}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} is not the configuration of a run: it holds no keys.")
    return {str(key): value for key, value in found.items()}


def value_of(config: dict[str, Any], key: str) -> Any:
    """Return the value of a key such as "model.path"; None where there is none."""
    node: Any = config
    for name in key.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node
