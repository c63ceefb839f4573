"""Where two runs begin to differ: the first step with different metrics, and the first tensor with
different bits. Times and sizes of processes are not compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_rl.errors import UserError
from mcore_rl.loop.journal import steps_of, weights_of
from mcore_rl.observability.jsonl import read_records
from mcore_rl.observability.run_folder import JOURNAL, METRICS_FILE

_OF_THE_MACHINE = ("time/", "perf/")


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two runs have in common."""

    num_steps: int
    """Steps for which both runs have metrics or weights."""
    num_numbers: int
    """How many numbers of their metrics were compared."""
    num_tensors: int
    """How many tensors of their weights were compared, over all steps."""
    metric: str = ""
    """The first metric that differs: "step 3: actor/loss is 0.5, was 0.25, first of 7"; "" if none
    does."""
    tensor: str = ""
    """The first tensor that differs, in the same form. "weights 4: ..." are the weights that step 4
    begins with, after the update of step 3."""

    @property
    def is_equal(self) -> bool:
        return not (self.metric or self.tensor)


def compare(folder: Path, other: Path) -> Comparison:
    """Compare a run with another one that it should equal.

    Args:
        folder: of the run.
        other: of the other run.

    Raises:
        UserError: if the two have no step in common, or a file of them cannot be read.
    """
    of_both = [_metrics(run) for run in (folder, other)]
    steps = sorted(of_both[0].keys() & of_both[1].keys())
    journals = [run / JOURNAL for run in (folder, other)]
    of_weights = sorted(set(steps_of(journals[0])) & set(steps_of(journals[1])))
    if not steps:
        raise UserError(f"{folder} and {other} have metrics of no step in common.")
    metric = tensor = ""
    num_numbers = num_tensors = 0
    for step in steps:
        found, wanted = (metrics[step] for metrics in of_both)
        num_numbers += len(found)
        metric = metric or _first(f"step {step}", found, wanted)
    for step in of_weights:
        found, wanted = (weights_of(journal, step) for journal in journals)
        num_tensors += len(found)
        tensor = tensor or _first(f"weights {step}", found, wanted)
    return Comparison(len({*steps, *of_weights}), num_numbers, num_tensors, metric, tensor)


def _metrics(run: Path) -> dict[int, dict[str, Any]]:
    file = run / METRICS_FILE
    if not file.is_file():
        raise UserError(f"{file} is not there: {run} is not a run folder.")
    return {
        record.pop("step"): {
            key: value for key, value in record.items() if not key.startswith(_OF_THE_MACHINE)
        }
        for record in read_records(file)
    }


def _first(place: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return the first entry that differs, and how many differ; "" if none."""
    names = [*found, *(name for name in wanted if name not in found)]
    others = [name for name in names if _text(found, name) != _text(wanted, name)]
    if not others:
        return ""
    name = others[0]
    return (
        f"{place}: {name} is {_text(found, name)}, was {_text(wanted, name)}, "
        f"first of {len(others)}"
    )


def _text(entries: Mapping[str, Any], name: str) -> str:
    """Return a number as text: equal bits give equal texts, and NaN equals NaN."""
    value = entries.get(name, "missing")
    return value if isinstance(value, str) else json.dumps(value)
