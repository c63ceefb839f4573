"""Writes the page: the data of the run folders, as JSON within `page.html`."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from mcore_rl.durable_files import write_whole
from mcore_rl.observability.alarms import ALARMS, explanations
from mcore_rl.observability.report.curves import plots_of
from mcore_rl.observability.report.run import RunFolder, differences, run_data, titles
from mcore_rl.observability.run_folder import CONFIG_FILE, REPORT_FILE, SAMPLES_FILE
from mcore_rl.printable import printable

_FILES = Path(__file__).parent
SCRIPTS = (
    "page.js",
    "curves.js",
    "alarms.js",
    "timeline.js",
    "samples.js",
    "numbers.js",
    "main.js",
)
"""In their order; one script in the page."""


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run folder and return its path.

    Raises:
        UserError: if the folder has no step in its metrics file and no samples, or a line that is
            not JSON.
    """
    return _write(run_dir / REPORT_FILE, [run_dir])


def write_comparison(run_dir: Path, other: Path) -> Path:
    """Write the report of two runs side by side into the first one's folder; return its path.

    Raises:
        UserError: as `write_report`, for either.
    """
    return _write(run_dir / f"report_beside_{other.resolve().name}.html", [run_dir, other])


def _write(file: Path, run_dirs: Sequence[Path]) -> Path:
    runs = [RunFolder.read(run_dir) for run_dir in run_dirs]
    data = _printable(report_data(runs))
    write_whole(file, page(" beside ".join(run["title"] for run in data["runs"]), data))
    return file


def report_data(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Return all that the page shows."""
    drawn, missing = plots_of([run.columns for run in runs])
    texts = explanations()
    return {
        "runs": [
            run_data(run, title, share=1 / len(runs))
            for run, title in zip(runs, titles(runs), strict=True)
        ],
        "plots": drawn,
        "missing": missing,
        "alarms": [
            {
                "title": alarm.title,
                "anchor": alarm.anchor,
                "key": alarm.key,
                "threshold": alarm.threshold,
                "text": texts[alarm.title],
            }
            for alarm in ALARMS
        ],
        "differences": differences(runs) if len(runs) > 1 else [],
        "files": {"samples": SAMPLES_FILE, "config": CONFIG_FILE},
    }


def page(title: str, data: dict[str, Any]) -> str:
    """Return the page.

    Args:
        title: any text.
        data: what `report_data` returns; no text of it can end the element that it stands in.
    """
    style = (_FILES / "page.css").read_text(encoding="utf-8")
    script = "\n".join((_FILES / name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'"use strict";\n{script}'
    parts = {
        "title": escape(title),
        "style_hash": _hash(style),
        "script_hash": _hash(script),
        "style": style,
        "script": script,
        "data": json.dumps(data, separators=(",", ":"), allow_nan=False).translate(_NO_MARKUP),
    }
    template = (_FILES / "page.html").read_text(encoding="utf-8")
    return re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], template)


_NO_MARKUP = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def _hash(text: str) -> str:
    """Return how a content security policy names a script or a style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _printable(value: Any) -> Any:
    """Return the value without control characters in texts and without numbers that JSON lacks."""
    if isinstance(value, dict):
        return {printable(str(key)): _printable(of_key) for key, of_key in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return printable(value) if isinstance(value, str) else value
