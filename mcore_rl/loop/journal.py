"""All inputs that a run got from outside, step by step, so that its training can be repeated.

    journal/step_00007.npz    what the engines answered and the rewards said in step 7, and what
                              the weights were that it began with

All else follows from these: which prompts come, which groups are discarded, how a step is cut into
minibatches. So a file holds no decision of the loop, and `replayed.py` makes the same loop decide
again. An answer is in the file of the step that took it, even if it was begun steps before.

A complete file appears when the engines have the next weights, before a checkpoint names them. A
run that resumes from a checkpoint writes the files of the coming steps again. A token takes about 8
bytes: id and log-probability. Texts are decoded again, and routes of experts are not kept.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from zipfile import BadZipFile

import numpy as np

from mcore_rl.durable_files import make_private, rename_whole
from mcore_rl.errors import UserError
from mcore_rl.foreign_json import parse_json
from mcore_rl.observability.jsonl import failed_write_ends_run
from mcore_rl.rollout.base import GenerationRequest, GenerationResult
from mcore_rl.types import VersionSpan

T = TypeVar("T")

FORMAT = 1
"""Format number of the files; files of another format are not read."""
_FILE = "step_{:05d}.npz"


class Key(NamedTuple):
    """The request that an answer belongs to. A request that comes again in a step has its own
    answer."""

    seed: int
    prompt: int
    """CRC-32 of its tokens."""

    @classmethod
    def of(cls, request: GenerationRequest) -> Key:
        """Return the key of a request."""
        return cls(request.sampling.seed, zlib.crc32(request.prompt_token_ids.tobytes()))


class Score(NamedTuple):
    """The result of a reward for one sample."""

    uid: str
    """The uid of its prompt."""
    sample: int
    """Its position in its group."""
    reward: float
    status: str
    metrics: Mapping[str, float]
    answer: str | None
    """The answer that the response states; None: it states none."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """The inputs of a step from outside."""

    weights: Mapping[str, str]
    """Short digests of the weights that the step began with, see `Fleet.weights`; in export
    order."""
    answers: list[tuple[Key, GenerationResult]] = field(default_factory=list)
    """Answers in the order in which they were taken; without texts."""
    scores: list[Score] = field(default_factory=list)
    """Scores in the order in which they were given."""
    has_routes: bool = False
    """Whether the loop read routes of the engines; routes are not kept."""


def write_step(folder: Path, step: int, record: StepRecord) -> None:
    """Write the record of a step; the file is complete when this returns.

    Raises:
        RunError: if it cannot be written.
    """
    results = [result for _, result in record.answers]
    header = {
        "format": FORMAT,
        "weights": record.weights,
        "has_routes": record.has_routes,
        "scores": record.scores,
        "finish_reasons": [result.finish_reason for result in results],
        "versions": [[(x.version, x.start, x.end) for x in r.versions] for r in results],
    }
    arrays = {
        "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
        "keys": np.array([key for key, _ in record.answers], np.int64).reshape(
            -1, len(Key._fields)
        ),
        "lengths": np.array([len(result.token_ids) for result in results], np.int64),
        "token_ids": _joined([result.token_ids for result in results], np.int32),
        "logprobs": _joined([result.logprobs for result in results], np.float32),
    }
    file = folder / _FILE.format(step)
    partial = file.with_name(f"{file.name}.partial")
    with failed_write_ends_run(file, step):
        make_private(folder)
        with partial.open("wb") as stream:
            np.savez(stream, **arrays)
        rename_whole(partial, file)


def read_step(folder: Path, step: int) -> StepRecord:
    """Return the record of a step.

    Raises:
        UserError: if the file does not exist, or is not a file of a journal.
    """
    return _read(folder, step, _record)


def weights_of(folder: Path, step: int) -> Mapping[str, str]:
    """Return the digests of the weights that a step began with: `StepRecord.weights`.

    Raises:
        UserError: as `read_step`.
    """
    return _read(folder, step, lambda header, _: header["weights"])


def _read(
    folder: Path, step: int, part: Callable[[Mapping[str, Any], Mapping[str, np.ndarray]], T]
) -> T:
    """Return the result of `part` for the header and the arrays of a file."""
    file = folder / _FILE.format(step)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            header = parse_json(arrays["header"].tobytes())
            if header["format"] != FORMAT:
                raise ValueError(f"it is of format {header['format']}, and this is {FORMAT}")
            return part(header, arrays)
    except FileNotFoundError:
        raise UserError(f"{file} is not there: the run did not finish that step.") from None
    except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} is no step of a journal: {reason}.") from error


def steps_of(folder: Path) -> list[int]:
    """Return the steps that a journal has, in order."""
    return sorted(int(file.stem.removeprefix("step_")) for file in folder.glob("step_*.npz"))


def drop_from(folder: Path, step: int) -> None:
    """Remove the files that a run which resumes with `step` writes again."""
    for later in steps_of(folder):
        if later >= step:
            (folder / _FILE.format(later)).unlink()


def _joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts])


def _record(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> StepRecord:
    ends = np.cumsum(arrays["lengths"])
    rows = zip(
        arrays["keys"].tolist(),
        np.split(arrays["token_ids"], ends)[:-1],  # nothing follows the last
        np.split(arrays["logprobs"], ends)[:-1],
        header["finish_reasons"],
        header["versions"],
        strict=True,
    )
    answers = [
        (
            Key(*key),
            GenerationResult(
                token_ids=token_ids,
                logprobs=logprobs,
                finish_reason=reason,
                versions=[VersionSpan(*span) for span in spans],
            ),
        )
        for key, token_ids, logprobs, reason, spans in rows
    ]
    scores = [Score(*score) for score in header["scores"]]
    return StepRecord(header["weights"], answers, scores, header["has_routes"])
