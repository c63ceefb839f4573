"""The files of a validation without training: `results.json` with every metric and its interval,
`samples.parquet` with every sample, and the printed table."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mcore_rl.durable_files import write_whole
from mcore_rl.foreign_json import parse_json
from mcore_rl.observability.jsonl import failed_write_ends_run
from mcore_rl.printable import printable
from mcore_rl.types import Sample, SampleGroup

RESULTS_FILE = "results.json"
SAMPLES_FILE = "samples.parquet"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A metric and the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceResults:
    """The results on one data source."""

    num_prompts: int
    num_samples: int
    metrics: Mapping[str, Estimate]
    """By the names that they have in `metrics.jsonl`."""


def write_results(
    folder: Path, step: int, interval: str, results: Mapping[str, SourceResults]
) -> None:
    """Write `results.json`.

    Args:
        folder: where.
        step: whose weights were validated.
        interval: what the intervals are, for the reader.
        results: by data source.

    Raises:
        RunError: if it cannot be written.
    """
    found = {source: asdict(of_source) for source, of_source in results.items()}
    content = {"step": step, "interval": interval, "data_sources": found}
    with failed_write_ends_run(folder / RESULTS_FILE, step):
        write_whole(folder / RESULTS_FILE, json.dumps(content, indent=2) + "\n")


def results_table(folder: Path) -> str:
    """Return `results.json` as a table: a metric of a data source in each line."""
    content = parse_json((folder / RESULTS_FILE).read_text())
    lines = [f"step {content['step']}; in brackets: {content['interval']}"]
    for source, found in content["data_sources"].items():
        counts = f"{found['num_prompts']} prompts, {found['num_samples']} samples"
        lines += [f"{printable(source)}  ({counts})", *_rows(f"eval/{source}/", found["metrics"])]
    lines.append(f"results  {folder / RESULTS_FILE}")
    return "".join(f"{line}\n" for line in lines)


def _rows(section: str, metrics: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    names = [printable(key.removeprefix(section)) for key in metrics]
    width = max(map(len, names))
    for name, found in zip(names, metrics.values(), strict=True):
        low, high = f"{found['low']:.4f}", f"{found['high']:.4f}"
        yield f"  {name:<{width}}  {found['value']:>10.4f}  [{low}, {high}]"


def write_samples(folder: Path, step: int, groups: Sequence[SampleGroup]) -> None:
    """Write `samples.parquet`: a row for each sample, in their order.

    The further numbers of the reward are columns `reward/<name>`, null in samples without one.

    Args:
        folder: where.
        step: whose weights drew the samples.
        groups: scored.

    Raises:
        RunError: if it cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    samples = [sample for group in groups for sample in group.samples]
    numbers = dict.fromkeys(name for sample in samples for name in sample.reward_metrics)
    schema = pa.schema(
        [
            *((name, pa.string()) for name in _TEXTS),
            *((name, pa.int64()) for name in ("index", "response_tokens")),
            *((name, pa.float64()) for name in ("reward", *map(_column, numbers))),
        ]
    )
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(map(_row, samples)), schema), content)
    with failed_write_ends_run(folder / SAMPLES_FILE, step):
        write_whole(folder / SAMPLES_FILE, content.getvalue())


_TEXTS = (
    "data_source",
    "uid",
    "prompt",
    "response",
    "ground_truth",
    "answer",
    "reward_status",
    "finish_reason",
)


def _row(sample: Sample) -> dict[str, Any]:
    prompt, truth = sample.prompt, sample.prompt.ground_truth
    return {
        "data_source": prompt.data_source,
        "uid": prompt.uid,
        "index": sample.index,
        "prompt": _utf8(prompt.text),
        "response": _utf8(sample.response_text),
        "ground_truth": _utf8(truth if isinstance(truth, str) else json.dumps(truth, default=str)),
        "answer": None if sample.answer is None else _utf8(sample.answer),
        "reward": sample.reward,
        "reward_status": sample.reward_status,
        "finish_reason": sample.finish_reason,
        "response_tokens": sample.num_response_tokens,
        **{_column(name): value for name, value in sample.reward_metrics.items()},
    }


def _column(name: str) -> str:
    return f"reward/{name}"


def _utf8(text: str) -> str:
    """Return the text without lone surrogates, which Parquet's encoding does not have."""
    return text.encode(errors="replace").decode()
